//! A Siemens XA enhanced multi-frame file that holds one volume, a frame per slice.
//!
//! Steps: what the file says it is; each frame's position, orientation, time and scaling
//! from its own functional groups or the shared ones; frames that do not make one evenly
//! spaced stack (localisers, several echoes, several volumes) are refused by name; the
//! frames are stacked along the right-handed normal of their plane.

use ndarray::Array3;

use super::geometry::{self, Directions, check_mm};
use super::header::{Item, Tag, date_time_ms, tags};
use super::kind::{self, Vendor, refuse};
use super::pixels::Layout;
use super::{DicomError, MAX_SLICE_STEPS, stack};
use crate::volume::{Volume, VolumeHeader};

/// What a frame's and the shared groups say of one frame.
struct Frame {
    position: [f64; 3],
    directions: Directions,
    pixel_mm: [f64; 2],
    temporal: Option<u32>,
    acquisition: Option<u32>,
    echo_ms: Option<f64>,
    after_start_ms: Option<f64>,
    acquired_ms: Option<f64>,
    tr_ms: Option<f64>,
    slope: f64,
    intercept: f64,
}

/// The groups that apply to one frame.
struct Groups<'d> {
    own: Item<'d>,
    shared: Option<Item<'d>>,
}

impl<'d> Groups<'d> {
    /// A functional group: the frame's own before the shared one.
    fn group(&self, tag: Tag) -> Option<Item<'d>> {
        let own = self.own.items(tag).next();
        own.or_else(|| self.shared.as_ref()?.items(tag).next())
    }

    fn needed(&self, tag: Tag) -> Result<Item<'d>, DicomError> {
        self.group(tag)
            .ok_or(DicomError::Missing { element: tag.name })
    }

    /// The frame's private elements, as Siemens nests them.
    fn private(&self) -> Option<Item<'d>> {
        let own = self.own.private_items(tags::FRAME_PRIVATE).next();
        own.or_else(|| {
            self.shared
                .as_ref()?
                .private_items(tags::FRAME_PRIVATE)
                .next()
        })
    }

    fn frame(&self) -> Result<Frame, DicomError> {
        if let Some(types) = self.group(tags::FRAME_TYPES) {
            refuse_by_type(&types, tags::FRAME_TYPE)?;
        }
        if let Some(diffusion) = self.group(tags::DIFFUSION)
            && diffusion
                .number(tags::B_VALUE)
                .is_ok_and(|value| value > 0.0)
        {
            return refuse("a diffusion image");
        }
        let content = self.group(tags::FRAME_CONTENT);
        let measures = self.needed(tags::PIXEL_MEASURES)?;
        let timing = self.group(tags::TIMING);
        let tr_ms = match timing.filter(|timing| timing.has(tags::REPETITION_TIME)) {
            Some(timing) => Some(geometry::tr_ms(&timing)?),
            None => None,
        };
        let (slope, intercept) = match self.group(tags::RESCALE) {
            Some(rescale) => (
                rescale.number(tags::RESCALE_SLOPE)?,
                rescale.number(tags::RESCALE_INTERCEPT)?,
            ),
            None => (1.0, 0.0),
        };
        let echo = self.group(tags::ECHO);
        let after_start_s = self
            .private()
            .and_then(|private| private.private_number(tags::TIME_AFTER_START));
        Ok(Frame {
            position: geometry::position(&self.needed(tags::PLANE_POSITION)?)?,
            directions: Directions::of(&self.needed(tags::PLANE_ORIENTATION)?)?,
            pixel_mm: geometry::pixel_mm(&measures)?,
            temporal: content.and_then(|content| content.whole(tags::TEMPORAL_INDEX)),
            acquisition: content.and_then(|content| content.whole(tags::FRAME_ACQUISITION)),
            echo_ms: echo.and_then(|echo| echo.number(tags::ECHO_TIME).ok()),
            after_start_ms: after_start_s.map(|seconds| seconds * 1000.0),
            acquired_ms: content
                .and_then(|content| content.text(tags::FRAME_TIME))
                .and_then(date_time_ms),
            tr_ms,
            slope,
            intercept,
        })
    }
}

/// Decodes one enhanced file.
///
/// - `top`: the data set of an enhanced MR image.
///
/// # Errors
/// [`DicomError`], naming the kind of file or the element.
pub(super) fn decode(top: &Item<'_>, vendor: Vendor) -> Result<Volume, DicomError> {
    match vendor {
        // Some releases leave the manufacturer out.
        Vendor::Siemens | Vendor::Unnamed => {}
        Vendor::Philips => return refuse("a Philips enhanced multi-frame file"),
        Vendor::Ge => return refuse("a GE enhanced multi-frame file"),
        Vendor::Other => return refuse("an enhanced multi-frame file of this vendor"),
    }
    refuse_by_type(top, tags::IMAGE_TYPE)?;
    if top.words(tags::IMAGE_TYPE).any(|word| word == "MOSAIC") {
        return refuse("a mosaic in an enhanced multi-frame file");
    }
    let layout = Layout::of(top)?;
    let frames = frame_count(top)?;
    let pixels = layout.data(top, frames)?;
    let described = frames_of(top, frames)?;
    let Some(first) = described.first() else {
        return Err(DicomError::Missing {
            element: tags::FRAME_GROUPS.name,
        });
    };
    refuse_several(&described, first)?;

    let positions: Vec<[f64; 3]> = described.iter().map(|frame| frame.position).collect();
    let single_mm = if frames == 1 {
        single_spacing(top)?
    } else {
        None
    };
    let stack = stack::order(&positions, first.directions, single_mm).map_err(|fault| {
        DicomError::Unsupported {
            name: match fault {
                stack::StackFault::SamePlace { .. } => {
                    "an enhanced file with several images of one slice"
                }
                stack::StackFault::Uneven { .. } => {
                    "an enhanced file whose frames are not evenly spaced"
                }
                stack::StackFault::Aslant { .. } => {
                    "an enhanced file whose frames do not lie above each other"
                }
                stack::StackFault::NoSpacing => {
                    "an enhanced file of one frame without a slice thickness"
                }
            },
        }
    })?;

    let frame_bytes = layout.rows * layout.columns * 2;
    let mut voxels = Vec::with_capacity(frames * layout.rows * layout.columns);
    for &index in &stack.order {
        let at = index * frame_bytes;
        let stored = pixels.get(at..at + frame_bytes).unwrap_or_default();
        let values = layout.values(stored);
        let frame = described.get(index).unwrap_or(first);
        if frame.slope == 1.0 && frame.intercept == 0.0 {
            voxels.extend(values);
        } else {
            voxels.extend(
                values.map(|value| super::single(f64::from(value) * frame.slope + frame.intercept)),
            );
        }
    }
    let voxels = Array3::from_shape_vec((frames, layout.rows, layout.columns), voxels);
    let tr_ms = match described.iter().find_map(|frame| frame.tr_ms) {
        Some(tr_ms) => tr_ms,
        None => geometry::tr_ms(top)?,
    };
    let acquired = described.iter().filter_map(|frame| frame.acquired_ms);
    let time_ms = acquired
        .min_by(f64::total_cmp)
        .or_else(|| top.acquired_ms());
    Ok(Volume {
        voxels: voxels.map_err(|_| DicomError::Missing {
            element: tags::PIXEL_DATA.name,
        })?,
        affine_lps: stack.affine(first.directions, first.pixel_mm),
        header: VolumeHeader {
            series_uid: top.series()?,
            patient: top.patient(),
            acquisition: number(top, &described)?,
            instance: top.whole(tags::INSTANCE_NUMBER),
            tr_ms,
            slice_times_ms: slice_times(&described, &stack.order, tr_ms),
            time_ms,
        },
    })
}

fn frame_count(top: &Item<'_>) -> Result<usize, DicomError> {
    let frames = top.whole(tags::FRAMES).ok_or(DicomError::Missing {
        element: tags::FRAMES.name,
    })?;
    let count = usize::try_from(frames).unwrap_or(usize::MAX);
    if (1..=MAX_SLICE_STEPS).contains(&count) {
        return Ok(count);
    }
    Err(DicomError::Range {
        element: tags::FRAMES.name,
        found: f64::from(frames),
        expected: "1 to 1024, the slices of one volume",
    })
}

fn frames_of(top: &Item<'_>, frames: usize) -> Result<Vec<Frame>, DicomError> {
    let shared = top.items(tags::SHARED_GROUPS).next();
    let described: Vec<Frame> = top
        .items(tags::FRAME_GROUPS)
        .take(frames + 1)
        .map(|own| Groups { own, shared }.frame())
        .collect::<Result<_, _>>()?;
    if described.len() == frames {
        return Ok(described);
    }
    Err(DicomError::Range {
        element: tags::FRAME_GROUPS.name,
        found: super::as_f64(described.len()),
        expected: "an item for each of NumberOfFrames",
    })
}

/// - `item`: what holds the words, at `tag`, and their neighbours.
fn refuse_by_type(item: &Item<'_>, tag: Tag) -> Result<(), DicomError> {
    kind::refuse_other_contrasts(item.words(tag))?;
    match item.text(tags::COMPLEX_COMPONENT) {
        None | Some("" | "MAGNITUDE") => {}
        Some("PHASE") => return refuse("a phase image"),
        Some(_) => return refuse("an image that is no magnitude"),
    }
    match item.text(tags::ACQUISITION_CONTRAST) {
        Some("DIFFUSION") => refuse("a diffusion image"),
        _ => Ok(()),
    }
}

/// Refuses a file of more than one image.
fn refuse_several(frames: &[Frame], first: &Frame) -> Result<(), DicomError> {
    let near = |a: [f64; 3], b: [f64; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4);
    for (index, frame) in frames.iter().enumerate() {
        let same = near(frame.directions.columns, first.directions.columns)
            && near(frame.directions.rows, first.directions.rows);
        if !same {
            return refuse("an enhanced file of several orientations, as a localiser");
        }
        if frame.temporal != first.temporal {
            return refuse("an enhanced file of several volumes");
        }
        if frame.echo_ms != first.echo_ms {
            return refuse("an enhanced file of several echoes");
        }
        let differs = |element, what| {
            Err(DicomError::Frame {
                element,
                frame: index + 1,
                what,
            })
        };
        if frame.pixel_mm != first.pixel_mm {
            return differs(tags::PIXEL_SPACING.name, "differs from the first frame's");
        }
        if frame.tr_ms != first.tr_ms {
            return differs(tags::REPETITION_TIME.name, "differs from the first frame's");
        }
    }
    Ok(())
}

/// How far slices are apart where there is only one.
fn single_spacing(top: &Item<'_>) -> Result<Option<f64>, DicomError> {
    let shared = top.items(tags::SHARED_GROUPS).next();
    let Some(own) = top.items(tags::FRAME_GROUPS).next() else {
        return Ok(None);
    };
    let measures = Groups { own, shared }.needed(tags::PIXEL_MEASURES)?;
    for tag in [tags::SLICE_SPACING, tags::SLICE_THICKNESS] {
        if measures.has(tag) {
            let spacing = measures.number(tag)?;
            check_mm(tag, spacing)?;
            return Ok(Some(spacing));
        }
    }
    Ok(None)
}

/// The volume's number in its run.
///
/// Releases differ in which of three counters they keep: the others stay at 1, so the largest
/// counts. Where all do, instances are volumes.
fn number(top: &Item<'_>, frames: &[Frame]) -> Result<u32, DicomError> {
    let of_frames = frames.iter().flat_map(|f| [f.temporal, f.acquisition]);
    let largest = of_frames
        .chain([top.whole(tags::ACQUISITION_NUMBER)])
        .flatten()
        .max();
    let instance = top.whole(tags::INSTANCE_NUMBER);
    match (largest, instance) {
        (Some(2..), _) => largest,
        (_, Some(1..)) => instance,
        (Some(1), _) => largest,
        _ => None,
    }
    .ok_or(DicomError::Missing {
        element: "(0020,9128) TemporalPositionIndex and (0020,0013) InstanceNumber",
    })
}

/// Each slice's time from the start of its volume, `[slice]`, milliseconds.
///
/// The private time after the start of the run is kept by de-identification, which may
/// overwrite the frames' dates. Times beyond the TR are absent rather than wrong.
fn slice_times(frames: &[Frame], order: &[usize], tr_ms: f64) -> Option<Vec<f64>> {
    let after_start: Option<Vec<f64>> = frames.iter().map(|frame| frame.after_start_ms).collect();
    let times = match after_start {
        Some(times) => times,
        None => frames
            .iter()
            .map(|f| f.acquired_ms)
            .collect::<Option<_>>()?,
    };
    let earliest = times.iter().copied().min_by(f64::total_cmp)?;
    let relative: Option<Vec<f64>> = order
        .iter()
        .map(|&index| Some(times.get(index)? - earliest))
        .collect();
    relative.filter(|times| times.iter().all(|time| *time <= tr_ms))
}
