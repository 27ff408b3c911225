//! From a volume to the mask's voxels: realigning, sampling, quality, each alone and as a whole.
//!
//! `cargo bench -p rtfmri --bench motion`. The head is a real one where the scanner data lie beside
//! the workspace (`shared/scanner/dicom`), else a synthetic one; the first line says which. It is
//! moved, noise is added, and after the criterion figures 1,000 volumes go the whole way, for the
//! 50th and 99th percentile and for growth.

#![expect(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::Criterion;
use ndarray::{Array3, ArrayView1};
use rtfmri::interpolation::Interpolation;
use rtfmri::motion::{Realigner, Rigid};
use rtfmri::quality::{Monitor, QualitySettings};
use rtfmri::volume::Affine;
use rtfmri::{Mask, PatientTag, SeriesUid, Volume, VolumeHeader, dicom};

/// What the promise is made for: voxels of a released model's mask.
const MASK_VOXELS: usize = 15_724;
/// Motions that are gone through in turn.
const MOTIONS: u32 = 20;

struct Run {
    name: &'static str,
    volumes: Vec<Volume>,
    mask: Mask,
    realigner: Realigner,
}

fn head([x, y, z]: [f64; 3]) -> f64 {
    let inside = 1.0 - (x / 60.0).powi(2) - (y / 75.0).powi(2) - (z / 55.0).powi(2);
    let skull = 1.0 / (1.0 + (-12.0 * inside).exp());
    let lumps = (x / 9.0).sin() * (y / 11.0 + 1.0).cos() + (z / 10.0 + x / 20.0).sin();
    skull * (600.0 + 120.0 * lumps)
}

/// The bytes of a real volume of 64 x 64 x 27.
fn real() -> Option<Vec<u8>> {
    let series = "../../../shared/scanner/dicom/siemens_e11_mosaic_run";
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(series);
    let mut files: Vec<_> = std::fs::read_dir(dir).ok()?.flatten().collect();
    files.sort_by_key(std::fs::DirEntry::path);
    std::fs::read(files.first()?.path()).ok()
}

fn empty(shape: [usize; 3], spacing_mm: [f64; 3]) -> Volume {
    let [slices, rows, columns] = shape;
    let mut affine_lps: Affine = [[0.0; 4]; 4];
    affine_lps[3][3] = 1.0;
    for (axis, side) in [columns, rows, slices].into_iter().enumerate() {
        let middle = (f64::from(u32::try_from(side).unwrap()) - 1.0) / 2.0;
        affine_lps[axis][axis] = spacing_mm[axis];
        affine_lps[axis][3] = -middle * spacing_mm[axis];
    }
    Volume {
        voxels: Array3::zeros((slices, rows, columns)),
        affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new("2.25.1"),
            patient: PatientTag::default(),
            acquisition: 1,
            instance: None,
            tr_ms: 1500.0,
            slice_times_ms: None,
            time_ms: None,
        },
    }
}

/// Where every voxel of a volume lies, in the order of its voxels, LPS, millimetres.
fn places(volume: &Volume) -> Vec<[f64; 3]> {
    let places = volume
        .voxels
        .indexed_iter()
        .map(|((slice, row, column), _)| {
            let index = [column, row, slice].map(|index| f64::from(u32::try_from(index).unwrap()));
            volume.position_lps(index)
        });
    places.collect()
}

/// A run of a head that moves, on a grid of its own.
fn run(name: &'static str, base: Option<&Volume>, grid: &Volume) -> Run {
    let places = places(grid);
    let source = base.map(|base| Interpolation::new(base).unwrap());
    let centre = |volume: &Volume| {
        let (slices, rows, columns) = volume.voxels.dim();
        let middle = [columns, rows, slices].map(|side| f64::from(u32::try_from(side).unwrap()));
        volume.position_lps(middle.map(|side| (side - 1.0) / 2.0))
    };
    // The two grids have the same middle.
    let (here, there) = (centre(grid), centre(base.unwrap_or(grid)));
    let off: [f64; 3] = std::array::from_fn(|axis| there[axis] - here[axis]);
    let mut state = 7_u32;
    let volumes = (0..MOTIONS).map(|at| {
        let phase = f64::from(at);
        let shift = [
            0.8 * phase.sin(),
            0.6 * (1.3 * phase).sin(),
            0.9 * (0.7 * phase).sin(),
        ];
        let turn = [
            0.01 * phase.sin(),
            0.008 * (0.9 * phase).sin(),
            0.006 * (1.7 * phase).sin(),
        ];
        let motion = Rigid::from_parameters(
            [
                shift[0] + off[0],
                shift[1] + off[1],
                shift[2] + off[2],
                turn[0],
                turn[1],
                turn[2],
            ],
            here,
        );
        let values = match &source {
            Some(source) => source.at(&places, &motion.matrix_lps()),
            #[expect(clippy::cast_possible_truncation, reason = "a voxel's value")]
            None => places
                .iter()
                .map(|place| head(motion.apply(*place)) as f32)
                .collect(),
        };
        let mut volume = grid.clone();
        volume.voxels = Array3::from_shape_vec(grid.voxels.dim(), values).unwrap();
        for value in &mut volume.voxels {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value += f32::from(state.to_be_bytes()[0]) / 16.0;
        }
        volume
    });
    let volumes: Vec<Volume> = volumes.collect();
    // The brightest voxels: the head.
    let first = &volumes[0];
    let mut bright: Vec<_> = first.voxels.indexed_iter().collect();
    bright.sort_by(|a, b| b.1.total_cmp(a.1));
    let voxels: Vec<[usize; 3]> = bright
        .iter()
        .take(MASK_VOXELS)
        .map(|((slice, row, column), _)| [*column, *row, *slice])
        .collect();
    let (slices, rows, columns) = first.voxels.dim();
    let sign = |row: usize| if row < 2 { -1.0 } else { 1.0 };
    let affine_ras = std::array::from_fn(|row| first.affine_lps[row].map(|v| sign(row) * v));
    Run {
        name,
        mask: Mask::from_voxels([columns, rows, slices], affine_ras, &voxels).unwrap(),
        realigner: Realigner::new(first).unwrap(),
        volumes,
    }
}

impl Run {
    /// Times the steps one by one.
    fn steps(&self, criterion: &mut Criterion) {
        let mut group = criterion.benchmark_group(self.name);
        group
            .sample_size(30)
            .measurement_time(Duration::from_secs(4));
        let start = Rigid::identity();
        let volume = &self.volumes[3];
        group.bench_function("realign, one volume", |bench| {
            bench.iter(|| self.realigner.realign(black_box(volume), &start).unwrap());
        });
        let motion = self.realigner.realign(volume, &start).unwrap();
        group.bench_function("spline of one volume", |bench| {
            bench.iter(|| Interpolation::new(black_box(volume)).unwrap());
        });
        let image = Interpolation::new(volume).unwrap();
        group.bench_function("15,724 voxels of it", |bench| {
            bench.iter(|| {
                self.mask
                    .sample_through(black_box(&image), &motion.matrix_lps())
            });
        });
        let voxels = self.mask.sample_through(&image, &motion.matrix_lps());
        let head = image.at(self.realigner.head(), &motion.matrix_lps());
        let mut monitor = Monitor::new(QualitySettings::default(), self.realigner.centre_lps());
        let mut at = 0;
        group.bench_function("quality of one volume", |bench| {
            bench.iter(|| {
                at += 1;
                monitor.push(at, &motion, voxels.view(), ArrayView1::from(&head))
            });
        });
        group.finish();
    }

    /// The whole way for 1,000 volumes: realign, interpolate, sample, judge.
    fn whole(&self) {
        let mut monitor = Monitor::new(QualitySettings::default(), self.realigner.centre_lps());
        let mut motion = Rigid::identity();
        let busy_before = busy_time();
        let mut times = Vec::new();
        let mut resident = Vec::new();
        for (at, volume) in (0..1_000).zip(self.volumes.iter().cycle()) {
            let start = Instant::now();
            motion = self.realigner.realign(volume, &motion).unwrap();
            let map = motion.matrix_lps();
            let image = Interpolation::new(volume).unwrap();
            let voxels = self.mask.sample_through(&image, &map);
            let head = image.at(self.realigner.head(), &map);
            black_box(monitor.push(at, &motion, voxels.view(), ArrayView1::from(&head)));
            times.push(start.elapsed());
            if at == 99 || at == 999 {
                resident.push(resident_kib());
            }
        }
        let busy_after = busy_time();
        let mean = |times: &[Duration]| {
            times.iter().sum::<Duration>() / u32::try_from(times.len()).unwrap()
        };
        let (early, late) = (mean(&times[..100]), mean(&times[900..]));
        times.sort();
        if let Some((after, before)) = busy_after.zip(busy_before) {
            // Linux books it tick by tick: the mean is right where one volume's would not be.
            eprintln!(
                "{}, whole way, processor time: {:.2?} a volume",
                self.name,
                (after - before) / 1_000
            );
        }
        eprintln!(
            "{}, whole way of 1,000 volumes, one core: p50 {:.2?}, p99 {:.2?}, largest {:.2?}; first \
             100 {early:.2?}, last 100 {late:.2?}; resident {resident:?} KiB after 100 and 1,000",
            self.name, times[500], times[990], times[999],
        );
    }
}

/// Processor time of this thread, where Linux tells it: what is left of a busy machine's figures.
fn busy_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// Resident memory of this process, where Linux tells it.
fn resident_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn main() {
    let file = real();
    let base = file
        .as_deref()
        .map(|bytes| dicom::decode_volume(bytes).unwrap());
    eprintln!(
        "{}",
        if base.is_some() {
            "a real head: shared/scanner/dicom/siemens_e11_mosaic_run"
        } else {
            "a synthetic head: shared/scanner was not found"
        }
    );
    let mut criterion = Criterion::default().configure_from_args();
    let small = match &base {
        Some(base) => run("64 x 64 x 27", Some(base), base),
        None => run("64 x 64 x 27", None, &empty([27, 64, 64], [3.0, 3.0, 4.0])),
    };
    let large = empty([74, 90, 76], [2.2, 2.2, 1.8]);
    let large = run("76 x 90 x 74", base.as_ref(), &large);
    for run in [&small, &large] {
        run.steps(&mut criterion);
        run.whole();
    }
    if let Some(bytes) = &file {
        criterion.bench_function("64 x 64 x 27/decode of a mosaic file", |bench| {
            bench.iter(|| dicom::decode_volume(black_box(bytes)).unwrap());
        });
    }
    criterion.final_summary();
}
