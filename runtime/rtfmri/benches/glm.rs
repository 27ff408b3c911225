//! One trial's fit at every voxel: 15,724 voxels, 288 and 144 volumes, both noise models.
//!
//! `cargo bench -p rtfmri --bench glm`, on one core. What is timed is all that a trial costs once
//! its last volume is in: the design (probe, reference, six confounds, cosines, constant) and the
//! fit with its variance. The run and the results are left in `target/tmp/glm-bench`, where
//! `glm_peer.py` beside this file takes them up: the same data through nilearn, times and values.

#![expect(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::{Array1, Array2};
use ndarray_npy::WriteNpyExt;
use rtfmri::events::Event;
use rtfmri::glm::{GlmSettings, Hrf, Noise, fit_trial};

const TR_S: f64 = 1.5;
const VOXELS: usize = 15_724;
const VOLUMES: usize = 288;
/// Trials whose decode time falls on the last of so many volumes, by onset.
const TRIALS: [(usize, f64); 2] = [(288, 423.0), (144, 207.0)];

/// Repeatable noise (Marsaglia's xorshift), roughly normal with variance one.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        f64::from(u32::try_from(self.0 >> 32).unwrap()) / f64::from(u32::MAX)
    }

    fn normal(&mut self) -> f64 {
        let sum: f64 = (0..4).map(|_| self.uniform() - 0.5).sum();
        sum * 3.0_f64.sqrt()
    }
}

struct Run {
    events: Vec<Event>,
    frames: Vec<usize>,
    /// `[volume, voxel]`, scanner units.
    series: Array2<f32>,
    /// `[volume, confound]`, mm and radians.
    confounds: Array2<f64>,
}

impl Run {
    /// Stimuli of 3 s every 4.5 s with blanks; voxels with a baseline, drift, motion and noise
    /// that remembers up to two thirds of the volume before.
    fn new() -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let events = (0_u8..92)
            .filter(|i| i % 8 != 5)
            .map(|i| Event::new(13.5 + 4.5 * f64::from(i), 3.0, format!("trial{i:02}")));
        let events = events.collect();
        let mut confounds = Array2::zeros((VOLUMES, 6));
        for column in 0..6 {
            let step = if column < 3 { 0.02 } else { 3e-4 };
            let mut place = 0.0;
            for row in 0..VOLUMES {
                place += step * random.normal();
                confounds[[row, column]] = place;
            }
        }
        let mut series = Array2::zeros((VOLUMES, VOXELS));
        for voxel in 0..VOXELS {
            let baseline = 400.0 + 800.0 * random.uniform();
            let (memory, std_dev) = (0.66 * random.uniform(), 5.0 + 10.0 * random.uniform());
            let (drift, motion) = (10.0 * random.normal(), 8.0 * random.normal());
            let mut noise = 0.0;
            for row in 0..VOLUMES {
                noise = memory * noise + std_dev * random.normal();
                let time = row as f64 / VOLUMES as f64;
                let value =
                    baseline + drift * (4.0 * time).cos() + motion * confounds[[row, 0]] + noise;
                #[expect(clippy::cast_possible_truncation, reason = "scanner values are single")]
                let value = value as f32;
                series[[row, voxel]] = value;
            }
        }
        Self {
            events,
            frames: (0..VOLUMES).collect(),
            series,
            confounds,
        }
    }

    fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        let file = File::create(dir.join("bold.npy")).unwrap();
        self.series.write_npy(file).unwrap();
        let mut text = String::from("onset\tduration\ttrial_type\n");
        for event in &self.events {
            let (onset_s, duration_s) = (event.onset_s, event.duration_s);
            writeln!(text, "{onset_s}\t{duration_s}\t{}", event.trial_type).unwrap();
        }
        fs::write(dir.join("events.tsv"), text).unwrap();
        let mut text = String::from("trans_x\ttrans_y\ttrans_z\trot_x\trot_y\trot_z\n");
        for row in self.confounds.rows() {
            let fields: Vec<String> = row.iter().map(f64::to_string).collect();
            writeln!(text, "{}", fields.join("\t")).unwrap();
        }
        fs::write(dir.join("confounds.tsv"), text).unwrap();
    }
}

fn keep(dir: &Path, name: &str, values: &Array1<f64>) {
    let file = File::create(dir.join(name)).unwrap();
    values.write_npy(file).unwrap();
}

/// Least processor time of a few runs, milliseconds: what other programs do not disturb, and what
/// the peer script reports too. `None` where the kernel does not count it.
fn cpu_ms(work: impl Fn()) -> Option<f64> {
    let spent = || -> Option<f64> {
        let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    let mut least = f64::INFINITY;
    for _ in 0..15 {
        let before = spent()?;
        work();
        least = least.min(spent()? - before);
    }
    Some(least / 1e6)
}

fn glm(criterion: &mut Criterion) {
    let run = Run::new();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("glm-bench");
    run.write(&dir);
    let mut group = criterion.benchmark_group("glm");
    group
        .sample_size(30)
        .measurement_time(Duration::from_secs(3));
    for (noise, name) in [(Noise::Ar1, "ar1"), (Noise::Ols, "ols")] {
        let settings = GlmSettings::new(TR_S, Hrf::Glover, noise);
        for (volumes, onset_s) in TRIALS {
            let found = run.events.iter().position(|event| event.onset_s == onset_s);
            let trial = found.unwrap();
            let fit = || {
                let (series, confounds) = (run.series.view(), run.confounds.view());
                let (events, frames) = (&run.events, &run.frames);
                fit_trial(&settings, events, trial, frames, series, Some(confounds)).unwrap()
            };
            let fitted = fit();
            keep(&dir, &format!("betas_{name}_{volumes}.npy"), &fitted.betas);
            keep(
                &dir,
                &format!("variance_{name}_{volumes}.npy"),
                &fitted.variance,
            );
            if let Some(cpu_ms) = cpu_ms(|| drop(black_box(fit()))) {
                eprintln!("{name}, {VOXELS} voxels, {volumes} volumes: {cpu_ms:.1} ms CPU at best");
            }
            group.bench_function(
                format!("{name}, {VOXELS} voxels, {volumes} volumes"),
                |bench| bench.iter(|| black_box(fit())),
            );
        }
    }
    group.finish();
}

criterion_group!(benches, glm);
criterion_main!(benches);
