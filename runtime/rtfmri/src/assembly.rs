//! Slices that trickle in, in any order, put together to volumes.
//!
//! One [`Assembler`] serves one series. Its first slice fixes the geometry; a slice that differs
//! is refused by name. A volume is complete when it has as many slices as the header states
//! ([`Assembler::finish`] also takes volumes of a series that does not state it). Memory is
//! bounded: by open volumes and by the bytes they hold. Affine and slice spacing come from the
//! positions themselves.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array3, s};

use crate::dicom::geometry::Directions;
use crate::dicom::stack::{self, PLACE_TOLERANCE_MM, StackFault};
use crate::volume::{Slice, SliceHeader, Volume, VolumeHeader, dot};

/// How far directions and sizes of one series may differ from file to file.
const SAME: f64 = 1e-4;
/// Slices of one volume, far more than any has.
const MAX_SLICES: usize = 1024;
/// A volume's number beyond this is no number of a run.
const MAX_NUMBER: u32 = 1_000_000;

/// How much an assembler holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Volumes that wait for slices.
    pub volumes: usize,
    /// Bytes of pixels that wait.
    pub bytes: usize,
}

impl Default for Limits {
    /// Enough for an export that sends slice by slice, all volumes of the first slice first.
    fn default() -> Limits {
        Limits {
            volumes: 4096,
            bytes: 512 << 20,
        }
    }
}

/// Why a slice is not taken, or slices make no volume.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AssemblyError {
    /// Not of the first slice's series.
    #[error("slice belongs to another series or another patient than the first")]
    Series,
    /// A slice that cannot be part of the others' volume.
    #[error("slice's {what} is not that of the series' first slice")]
    Geometry {
        /// What differs.
        what: &'static str,
    },
    /// A slice of another TR.
    #[error("slice's TR is {found} ms, the series' is {expected} ms")]
    Tr {
        /// The series'.
        expected: f64,
        /// The slice's.
        found: f64,
    },
    /// A number that no volume has.
    #[error("slice belongs to volume {found}, expected 1 to {MAX_NUMBER}")]
    Number {
        /// The number.
        found: u32,
    },
    /// The stated count of slices is not that of the first slice, or none that a volume has.
    #[error("slice's volume is stated to have {found} slices, expected {expected}")]
    Count {
        /// What the slice states.
        found: u32,
        /// The first slice's, or the most there may be.
        expected: u32,
    },
    /// Two different slices at one place of one volume.
    #[error("volume {volume} has two different slices at one place")]
    SamePlace {
        /// The volume.
        volume: u32,
    },
    /// A volume whose slices are all there, but not in a row.
    #[error(
        "volume {volume} has all its slices, but they are not evenly spaced: one is {off_mm} mm off"
    )]
    Spacing {
        /// The volume.
        volume: u32,
        /// By how much, millimetres.
        off_mm: f64,
    },
    /// One slice without a spacing.
    #[error("volume {volume} has one slice, whose thickness is not stated")]
    Thickness {
        /// The volume.
        volume: u32,
    },
    /// Too many volumes wait for slices.
    #[error("{limit} volumes wait for slices, no further one is begun")]
    TooManyOpen {
        /// The limit.
        limit: usize,
    },
    /// Too many bytes wait.
    #[error("slices of {limit} bytes wait for their volumes, no further one is taken")]
    TooManyBytes {
        /// The limit.
        limit: usize,
    },
}

/// What became of a slice.
#[derive(Clone, Debug, PartialEq)]
pub enum Added {
    /// Its volume waits for more; how many, where that is known.
    Waiting {
        /// Slices that are still to come.
        missing: Option<usize>,
    },
    /// It was there already, or its volume is complete.
    Duplicate,
    /// It was the last one.
    Complete(Box<Volume>),
}

/// A volume that waits for slices.
#[derive(Clone, Debug, PartialEq)]
pub struct Incomplete {
    /// The volume, from 1.
    pub number: u32,
    /// Slices that are there.
    pub present: usize,
    /// Slices that it has, where that is known.
    pub expected: Option<usize>,
    /// Which slices are missing, by place from 0, where a complete volume tells the places.
    pub missing: Option<Vec<usize>>,
}

/// Puts one series' slices together.
#[derive(Debug)]
pub struct Assembler {
    limits: Limits,
    first: Option<First>,
    open: BTreeMap<u32, Open>,
    complete: BTreeSet<u32>,
    bytes: usize,
    /// Where slices lie along the normal, by a complete volume.
    places: Option<Vec<f64>>,
}

/// What all slices share.
#[derive(Debug)]
struct First {
    header: SliceHeader,
    directions: Directions,
    pixel_mm: [f64; 2],
    spacing_mm: Option<f64>,
    sides: (usize, usize),
    /// The first slice's corner within its plane.
    in_plane: [f64; 2],
}

#[derive(Debug, Default)]
struct Open {
    slices: Vec<Slice>,
}

impl Assembler {
    /// An assembler of a series of which nothing is known yet.
    #[must_use]
    pub fn new(limits: Limits) -> Assembler {
        Assembler {
            limits,
            first: None,
            open: BTreeMap::new(),
            complete: BTreeSet::new(),
            bytes: 0,
            places: None,
        }
    }

    /// Takes one slice.
    ///
    /// # Errors
    /// [`AssemblyError`] where it does not belong here; what was taken before stays. A volume
    /// whose slices turn out not to make one is given up.
    pub fn add(&mut self, slice: Slice) -> Result<Added, AssemblyError> {
        let number = slice.header.number;
        if !(1..=MAX_NUMBER).contains(&number) {
            return Err(AssemblyError::Number { found: number });
        }
        if let Some(found) = slice.header.slices
            && usize::try_from(found).map_or(true, |count| !(1..=MAX_SLICES).contains(&count))
        {
            return Err(AssemblyError::Count {
                found,
                expected: u32::try_from(MAX_SLICES).unwrap_or(u32::MAX),
            });
        }
        match &self.first {
            Some(first) => first.compare(&slice)?,
            None => self.first = Some(First::of(&slice)),
        }
        if self.complete.contains(&number) {
            return Ok(Added::Duplicate);
        }
        if let Some(open) = self.open.get(&number) {
            if let Some(same) = open.at_place_of(&slice) {
                return if same.pixels == slice.pixels {
                    Ok(Added::Duplicate)
                } else {
                    Err(AssemblyError::SamePlace { volume: number })
                };
            }
        } else if self.open.len() >= self.limits.volumes {
            return Err(AssemblyError::TooManyOpen {
                limit: self.limits.volumes,
            });
        }
        let len_bytes = slice.pixels.len() * size_of::<f32>();
        if self.bytes + len_bytes > self.limits.bytes {
            return Err(AssemblyError::TooManyBytes {
                limit: self.limits.bytes,
            });
        }
        let expected = self.expected();
        let open = self.open.entry(number).or_default();
        if open.slices.len() >= MAX_SLICES {
            return Err(AssemblyError::Count {
                found: u32::try_from(MAX_SLICES + 1).unwrap_or(u32::MAX),
                expected: u32::try_from(MAX_SLICES).unwrap_or(u32::MAX),
            });
        }
        open.slices.push(slice);
        self.bytes += len_bytes;
        let present = open.slices.len();
        match expected {
            Some(expected) if present >= expected => {
                let volume = self.close(number)?;
                Ok(Added::Complete(Box::new(volume)))
            }
            expected => Ok(Added::Waiting {
                missing: expected.map(|expected| expected - present),
            }),
        }
    }

    /// Slices of a volume, where the series says so.
    fn expected(&self) -> Option<usize> {
        let stated = self.first.as_ref()?.header.slices?;
        usize::try_from(stated).ok()
    }

    /// The volumes that wait, by number.
    #[must_use]
    pub fn incomplete(&self) -> Vec<Incomplete> {
        let normal = self.first.as_ref().map(|first| first.directions.normal());
        let waiting = self.open.iter().map(|(number, open)| {
            let missing = self.places.as_ref().zip(normal).map(|(places, normal)| {
                let there = |place: &f64| {
                    open.slices.iter().any(|slice| {
                        (dot(slice.position_lps, normal) - place).abs() <= PLACE_TOLERANCE_MM
                    })
                };
                let indices = places.iter().enumerate();
                indices
                    .filter(|(_, place)| !there(place))
                    .map(|(index, _)| index)
                    .collect()
            });
            Incomplete {
                number: *number,
                present: open.slices.len(),
                expected: self.expected().or(self.places.as_ref().map(Vec::len)),
                missing,
            }
        });
        waiting.collect()
    }

    /// Gives up a volume that waits; its slices are forgotten, later ones are duplicates.
    pub fn give_up(&mut self, number: u32) {
        if let Some(open) = self.open.remove(&number) {
            self.bytes = self.bytes.saturating_sub(open.bytes());
            self.complete.insert(number);
        }
    }

    /// Ends a series: volumes of one that does not state its count of slices are complete if they
    /// have as many as its largest one.
    ///
    /// Returns the volumes that come of it, by number; the others stay [`Assembler::incomplete`].
    ///
    /// # Errors
    /// None as a whole: each volume has its own.
    pub fn finish(&mut self) -> Vec<Result<Volume, AssemblyError>> {
        if self.expected().is_some() {
            return Vec::new();
        }
        let most = self.open.values().map(|open| open.slices.len()).max();
        let whole: Vec<u32> = self
            .open
            .iter()
            .filter(|(_, open)| Some(open.slices.len()) == most)
            .map(|(number, _)| *number)
            .collect();
        whole.into_iter().map(|number| self.close(number)).collect()
    }

    /// Makes a volume of all the slices that are there.
    fn close(&mut self, number: u32) -> Result<Volume, AssemblyError> {
        let open = self.open.remove(&number).unwrap_or_default();
        self.bytes = self.bytes.saturating_sub(open.bytes());
        self.complete.insert(number);
        let Some(first) = &self.first else {
            return Err(AssemblyError::Number { found: number });
        };
        let (volume, places) = first.volume(number, &open.slices)?;
        self.places.get_or_insert(places);
        Ok(volume)
    }
}

impl Open {
    fn at_place_of(&self, slice: &Slice) -> Option<&Slice> {
        self.slices.iter().find(|other| {
            let off = [0, 1, 2].map(|axis| other.position_lps[axis] - slice.position_lps[axis]);
            dot(off, off).sqrt() <= PLACE_TOLERANCE_MM
        })
    }

    fn bytes(&self) -> usize {
        let pixels: usize = self.slices.iter().map(|slice| slice.pixels.len()).sum();
        pixels * size_of::<f32>()
    }
}

impl First {
    fn of(slice: &Slice) -> First {
        let directions = Directions {
            columns: slice.columns_lps,
            rows: slice.rows_lps,
        };
        First {
            header: slice.header.clone(),
            in_plane: directions.in_plane(slice.position_lps),
            directions,
            pixel_mm: slice.pixel_mm,
            spacing_mm: slice.spacing_mm,
            sides: slice.pixels.dim(),
        }
    }

    fn compare(&self, slice: &Slice) -> Result<(), AssemblyError> {
        let (own, other) = (&self.header, &slice.header);
        if own.series_uid != other.series_uid || own.patient != other.patient {
            return Err(AssemblyError::Series);
        }
        let differs = |what| Err(AssemblyError::Geometry { what });
        if self.sides != slice.pixels.dim() {
            return differs("size in pixels");
        }
        let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= SAME);
        if !near(&self.directions.columns, &slice.columns_lps)
            || !near(&self.directions.rows, &slice.rows_lps)
        {
            return differs("orientation");
        }
        if !near(&self.pixel_mm, &slice.pixel_mm) {
            return differs("pixel size");
        }
        if self.spacing_mm != slice.spacing_mm {
            return differs("slice spacing");
        }
        if (own.tr_ms - other.tr_ms).abs() > 0.5 {
            return Err(AssemblyError::Tr {
                expected: own.tr_ms,
                found: other.tr_ms,
            });
        }
        if own.slices != other.slices {
            return Err(AssemblyError::Count {
                found: other.slices.unwrap_or_default(),
                expected: own.slices.unwrap_or_default(),
            });
        }
        // A slice beside the others' stack would make a slanted volume; a tenth of a pixel is more
        // than rounding does over a tall stack.
        let in_plane = self.directions.in_plane(slice.position_lps);
        let shift = self
            .in_plane
            .iter()
            .zip(in_plane)
            .map(|(a, b)| (a - b).abs());
        let [row_mm, column_mm] = self.pixel_mm;
        if shift.fold(0.0, f64::max) > 0.1 * row_mm.min(column_mm) {
            return differs("place within its plane");
        }
        Ok(())
    }

    /// The volume of these slices, and where they lie along the normal.
    fn volume(&self, number: u32, slices: &[Slice]) -> Result<(Volume, Vec<f64>), AssemblyError> {
        let positions: Vec<[f64; 3]> = slices.iter().map(|slice| slice.position_lps).collect();
        let stack = stack::order(&positions, self.directions, self.spacing_mm);
        let stack = stack.map_err(|fault| match fault {
            StackFault::SamePlace { .. } => AssemblyError::SamePlace { volume: number },
            StackFault::Uneven { off_mm, .. } | StackFault::Aslant { off_mm } => {
                AssemblyError::Spacing {
                    volume: number,
                    off_mm,
                }
            }
            StackFault::NoSpacing => AssemblyError::Thickness { volume: number },
        })?;
        let ordered: Vec<&Slice> = stack
            .order
            .iter()
            .filter_map(|index| slices.get(*index))
            .collect();
        let (rows, columns) = self.sides;
        let mut voxels = Array3::zeros((ordered.len(), rows, columns));
        for (place, slice) in ordered.iter().enumerate() {
            voxels.slice_mut(s![place, .., ..]).assign(&slice.pixels);
        }
        let normal = self.directions.normal();
        let places = ordered
            .iter()
            .map(|slice| dot(slice.position_lps, normal))
            .collect();
        let times = ordered.iter().filter_map(|slice| slice.header.time_ms);
        let header = VolumeHeader {
            series_uid: self.header.series_uid.clone(),
            patient: self.header.patient,
            acquisition: number,
            instance: ordered
                .iter()
                .filter_map(|slice| slice.header.instance)
                .min(),
            tr_ms: self.header.tr_ms,
            slice_times_ms: slice_times(&ordered, self.header.tr_ms),
            time_ms: times.min_by(f64::total_cmp),
        };
        let affine_lps = stack.affine(self.directions, self.pixel_mm);
        let volume = Volume {
            voxels,
            affine_lps,
            header,
        };
        Ok((volume, places))
    }
}

/// Each slice's time from the start of its volume, milliseconds.
///
/// Measured times come first; where there are none or they cannot be (all equal, further apart than
/// the TR), the protocol's order is spread over the TR. Without both there are none.
fn slice_times(ordered: &[&Slice], tr_ms: f64) -> Option<Vec<f64>> {
    measured_times(ordered, tr_ms).or_else(|| planned_times(ordered, tr_ms))
}

fn measured_times(ordered: &[&Slice], tr_ms: f64) -> Option<Vec<f64>> {
    let taken: Option<Vec<f64>> = ordered.iter().map(|slice| slice.header.taken_ms).collect();
    let taken = taken?;
    let earliest = taken.iter().copied().min_by(f64::total_cmp)?;
    let latest = taken.iter().copied().max_by(f64::total_cmp)?;
    let told_apart = taken.len() == 1 || latest > earliest;
    let credible = told_apart && latest - earliest <= tr_ms;
    credible.then(|| taken.iter().map(|time| time - earliest).collect())
}

fn planned_times(ordered: &[&Slice], tr_ms: f64) -> Option<Vec<f64>> {
    let order = ordered.first()?.header.order?;
    let count = ordered.len();
    let step_ms = (tr_ms - order.delay_ms) / f64::from(u32::try_from(count).ok()?);
    if step_ms <= 0.0 {
        return None;
    }
    let mut used = BTreeSet::new();
    let times: Option<Vec<f64>> = ordered
        .iter()
        .map(|slice| {
            let rank = slice.header.rank?;
            let index = usize::try_from(rank).ok().filter(|rank| *rank < count)?;
            if !used.insert(index) {
                return None;
            }
            // Interleaved: the first, third, fifth, then the second, fourth.
            let turn = if !order.interleaved {
                index
            } else if index % 2 == 0 {
                index / 2
            } else {
                (count - 1) / 2 + index.div_ceil(2)
            };
            Some(f64::from(u32::try_from(turn).ok()?) * step_ms)
        })
        .collect();
    times
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dicom::{self, Image};
    use crate::mosaic::tests::volume;
    use crate::slices::{SliceVendor, encode};
    use crate::volume::SliceOrder;

    fn slices(volume: &Volume, vendor: SliceVendor) -> Vec<Slice> {
        let files = encode(volume, vendor).unwrap();
        let read = files
            .iter()
            .map(|bytes| match dicom::decode(bytes).unwrap() {
                Image::Slice(slice) => slice,
                Image::Volume(_) => panic!("a slice was written"),
            });
        read.collect()
    }

    fn vendor() -> impl Strategy<Value = SliceVendor> {
        prop_oneof![Just(SliceVendor::Ge), Just(SliceVendor::Philips)]
    }

    proptest! {
        #[test]
        fn slices_in_any_order_give_the_same_volume(
            volume in volume(),
            vendor in vendor(),
            keys in prop::collection::vec(any::<u64>(), 12),
            again in any::<prop::sample::Index>(),
        ) {
            let slices = slices(&volume, vendor);
            let mut order: Vec<usize> = (0..slices.len()).collect();
            order.sort_by_key(|index| keys[*index]);
            let mut assembler = Assembler::new(Limits::default());
            let mut complete = None;
            for (count, index) in order.iter().enumerate() {
                match assembler.add(slices[*index].clone()).unwrap() {
                    Added::Complete(volume) => complete = Some((count, volume)),
                    Added::Waiting { missing } => {
                        prop_assert_eq!(missing, Some(slices.len() - count - 1));
                        let twice = assembler.add(slices[*index].clone()).unwrap();
                        prop_assert_eq!(twice, Added::Duplicate);
                    }
                    Added::Duplicate => prop_assert!(false, "no slice came twice"),
                }
            }
            let (last, found) = complete.unwrap();
            prop_assert_eq!(last, slices.len() - 1);
            prop_assert_eq!(&found.voxels, &volume.voxels);
            for (found, written) in found.affine_lps.iter().zip(&volume.affine_lps) {
                for (found, written) in found.iter().zip(written) {
                    prop_assert!((found - written).abs() < 1e-3, "{found} for {written}");
                }
            }
            prop_assert_eq!(found.header.acquisition, volume.header.acquisition);
            prop_assert_eq!(&found.header.series_uid, &volume.header.series_uid);
            prop_assert_eq!(assembler.incomplete(), []);
            let late = slices[again.index(slices.len())].clone();
            prop_assert_eq!(assembler.add(late).unwrap(), Added::Duplicate);
            if vendor == SliceVendor::Philips {
                prop_assert_eq!(&found.header.slice_times_ms, &None);
                prop_assert_eq!(found.header.time_ms, volume.header.time_ms);
            }
        }

        #[test]
        fn changed_bytes_of_a_file_give_an_answer(
            volume in volume(),
            vendor in vendor(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let mut bytes = encode(&volume, vendor).unwrap().swap_remove(0);
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(Image::Slice(slice)) = dicom::decode(&bytes) {
                prop_assert!(slice.pixels.len() * 2 <= bytes.len());
                // A slice of any numbers is taken or refused.
                let mut assembler = Assembler::new(Limits::default());
                let _ = assembler.add(slice.clone());
                let _ = assembler.add(slice);
                let _ = assembler.finish();
            }
        }

        #[test]
        fn any_cut_of_a_file_is_refused(
            volume in volume(),
            vendor in vendor(),
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = encode(&volume, vendor).unwrap().swap_remove(0);
            prop_assert!(dicom::decode(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    fn three_slices() -> Vec<Slice> {
        let voxels = Array3::from_shape_fn((3, 4, 5), |(k, j, i)| {
            f32::from(u8::try_from(k * 20 + j * 5 + i).unwrap())
        });
        let volume = Volume {
            voxels,
            affine_lps: [
                [3.0, 0.0, 0.0, -7.0],
                [0.0, 2.0, 0.0, -5.0],
                [0.0, 0.0, 4.0, 1.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            header: VolumeHeader {
                series_uid: crate::mosaic::series_uid(5),
                patient: crate::PatientTag::default(),
                acquisition: 2,
                instance: None,
                tr_ms: 900.0,
                slice_times_ms: Some(vec![0.0, 600.0, 300.0]),
                time_ms: Some(1000.0),
            },
        };
        slices(&volume, SliceVendor::Ge)
    }

    fn complete(slices: &[Slice]) -> Volume {
        let mut assembler = Assembler::new(Limits::default());
        for slice in slices {
            if let Added::Complete(volume) = assembler.add(slice.clone()).unwrap() {
                return *volume;
            }
        }
        panic!("the slices are a volume");
    }

    #[test]
    fn measured_slice_times_and_the_time_of_the_volume_are_kept() {
        let volume = complete(&three_slices());
        assert_eq!(volume.header.slice_times_ms, Some(vec![0.0, 600.0, 300.0]));
        // The run's start, one TR, and the moment that the first slice was done.
        assert_eq!(volume.header.time_ms, Some(1000.0 + 900.0 + 1.0));
    }

    #[test]
    fn the_protocols_order_serves_where_no_times_were_measured() {
        let mut slices = three_slices();
        for slice in &mut slices {
            slice.header.taken_ms = None;
            slice.header.order = Some(SliceOrder {
                interleaved: true,
                delay_ms: 300.0,
            });
        }
        let times = complete(&slices).header.slice_times_ms;
        assert_eq!(times, Some(vec![0.0, 400.0, 200.0]));
        // A rank that two slices share tells nothing.
        slices[1].header.rank = Some(0);
        assert_eq!(complete(&slices).header.slice_times_ms, None);
    }

    #[test]
    fn times_that_cannot_be_are_none() {
        let mut slices = three_slices();
        slices[1].header.taken_ms = Some(5000.0);
        assert_eq!(complete(&slices).header.slice_times_ms, None);
        for slice in &mut slices {
            slice.header.taken_ms = Some(7.0);
        }
        assert_eq!(complete(&slices).header.slice_times_ms, None);
    }

    #[test]
    fn slices_of_another_geometry_are_refused_by_name() {
        let slices = three_slices();
        let refused = |change: fn(&mut Slice)| {
            let mut assembler = Assembler::new(Limits::default());
            assembler.add(slices[0].clone()).unwrap();
            let mut other = slices[1].clone();
            change(&mut other);
            assembler.add(other).unwrap_err().to_string()
        };
        let text = refused(|slice| slice.rows_lps = [0.0, 0.8, 0.6]);
        assert!(text.contains("orientation"), "{text}");
        let text = refused(|slice| slice.pixel_mm = [2.0, 3.5]);
        assert!(text.contains("pixel size"), "{text}");
        let text = refused(|slice| slice.position_lps[0] += 1.0);
        assert!(text.contains("place within its plane"), "{text}");
        let text = refused(|slice| slice.header.tr_ms = 1000.0);
        assert!(text.contains("1000 ms"), "{text}");
        let text = refused(|slice| slice.header.slices = Some(4));
        assert!(text.contains("4 slices, expected 3"), "{text}");
        let text = refused(|slice| slice.header.series_uid = crate::SeriesUid::new("1.2"));
        assert!(text.contains("another series"), "{text}");
    }

    #[test]
    fn two_slices_at_one_place_and_gaps_are_refused() {
        let mut slices = three_slices();
        let mut assembler = Assembler::new(Limits::default());
        assembler.add(slices[0].clone()).unwrap();
        let mut twin = slices[0].clone();
        twin.pixels[[0, 0]] += 1.0;
        assert_eq!(
            assembler.add(twin),
            Err(AssemblyError::SamePlace { volume: 2 })
        );
        slices[2].position_lps[2] += 4.0;
        assembler.add(slices[1].clone()).unwrap();
        assert!(matches!(
            assembler.add(slices[2].clone()),
            Err(AssemblyError::Spacing { volume: 2, .. })
        ));
    }

    #[test]
    fn what_is_missing_is_named_once_a_volume_shows_the_places() {
        let slices = three_slices();
        let mut assembler = Assembler::new(Limits::default());
        let mut early = slices[0].clone();
        early.header.number = 1;
        assembler.add(early).unwrap();
        let expected = |missing| Incomplete {
            number: 1,
            present: 1,
            expected: Some(3),
            missing,
        };
        assert_eq!(assembler.incomplete(), [expected(None)]);
        for slice in slices {
            assembler.add(slice).unwrap();
        }
        assert_eq!(assembler.incomplete(), [expected(Some(vec![1, 2]))]);
        assembler.give_up(1);
        assert_eq!(assembler.incomplete(), []);
    }

    #[test]
    fn a_series_without_a_count_is_complete_at_its_end() {
        let mut assembler = Assembler::new(Limits::default());
        for (index, mut slice) in three_slices().into_iter().enumerate() {
            slice.header.slices = None;
            let added = assembler.add(slice.clone()).unwrap();
            assert_eq!(added, Added::Waiting { missing: None });
            slice.header.number = 3;
            if index < 2 {
                assembler.add(slice).unwrap();
            }
        }
        let volumes = assembler.finish();
        assert_eq!(volumes.len(), 1);
        assert_eq!(volumes[0].as_ref().unwrap().header.acquisition, 2);
        assert_eq!(assembler.incomplete()[0].missing, Some(vec![2]));
    }

    #[test]
    fn memory_is_bounded_by_volumes_and_by_bytes() {
        let slice = &three_slices()[0];
        let fill = |limits| {
            let mut assembler = Assembler::new(limits);
            let mut number = 0;
            loop {
                number += 1;
                let mut slice = slice.clone();
                slice.header.number = number;
                if let Err(error) = assembler.add(slice) {
                    return (number, error);
                }
            }
        };
        let (number, error) = fill(Limits {
            volumes: 3,
            bytes: 1 << 20,
        });
        assert_eq!(
            (number, error),
            (4, AssemblyError::TooManyOpen { limit: 3 })
        );
        let (number, error) = fill(Limits {
            volumes: 100,
            bytes: 200,
        });
        assert_eq!(
            (number, error),
            (3, AssemblyError::TooManyBytes { limit: 200 })
        );
    }
}
