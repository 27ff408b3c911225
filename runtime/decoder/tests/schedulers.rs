//! Few-step samplers against recorded runs of diffusers, step by step.
//!
//! The recordings lie beside the repository (`../shared/golden`); a clone without them says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::VecDeque;
use std::path::Path;

use bundle::EdmSchedule;
use decoder::sampler::{SigmaTable, ddim, euler, lcm, spacing, tcd};
use ndarray::{ArrayD, Axis};
use safetensors::SafeTensors;

/// Single precision, a few operations per step; a share of the largest value of the run, since the
/// levels reach 4096.
const CLOSE: f32 = 4e-6;

fn tensor(file: &SafeTensors<'_>, name: &str) -> Option<ArrayD<f32>> {
    let view = file.tensor(name).ok()?;
    let bytes = view.data().chunks_exact(4);
    let values = bytes
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    Some(ArrayD::from_shape_vec(view.shape().to_vec(), values).unwrap())
}

#[test]
fn every_recorded_run_is_followed_step_by_step() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    let (Ok(bytes), Ok(json)) = (
        std::fs::read(folder.join("io_schedulers.safetensors")),
        std::fs::read(folder.join("io_schedulers.json")),
    ) else {
        eprintln!("not compared: the recorded schedulers in ../shared/golden were not found");
        return;
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let schedule = EdmSchedule {
        linear_start: 0.00085,
        linear_end: 0.012,
        steps: 1000,
    };
    let plain = SigmaTable::new(&schedule);
    let shifted = plain.with_zero_terminal_snr();
    let mut seen_classes = std::collections::BTreeSet::new();
    for (name, run) in json["runs"].as_object().unwrap() {
        let of = |what: &str| tensor(&file, &format!("{name}/{what}"));
        let steps = usize::try_from(run["steps"].as_u64().unwrap()).unwrap();
        let (class, config) = (run["class"].as_str().unwrap(), &run["config"]);
        let table = if config["rescale_betas_zero_snr"] == true {
            &shifted
        } else {
            &plain
        };
        let times = match (class, config["timestep_spacing"].as_str().unwrap()) {
            ("LCMScheduler" | "TCDScheduler", _) => {
                let strength = if name.contains("strength_0.6") {
                    0.6
                } else {
                    1.0
                };
                spacing::distilled(1000, steps, strength).unwrap()
            }
            (_, "leading") => spacing::leading(1000, steps, 1).unwrap(),
            _ => spacing::trailing(1000, steps).unwrap(),
        };
        let recorded: Vec<u64> = run["timesteps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|time| time.as_f64().unwrap().to_string().parse().unwrap())
            .collect();
        assert!(
            times.iter().map(|&time| time as u64).eq(recorded),
            "{name}: {times:?}"
        );

        let expected = of("x_per_step").unwrap();
        let mut noise: VecDeque<ArrayD<f32>> = of("noise")
            .map(|draws| {
                draws
                    .axis_iter(Axis(0))
                    .map(|draw| draw.to_owned())
                    .collect()
            })
            .unwrap_or_default();
        let start = of("x_init").unwrap();
        let largest = |values: &ArrayD<f32>| values.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
        let scale = largest(&start).max(largest(&expected));
        let (mut worst, mut seen) = (0.0_f32, 0);
        let mut network = |latent: &ArrayD<f32>, _: usize| Ok(latent * 0.1 + 0.05);
        let mut draw = || noise.pop_front().expect("one draw between two steps");
        let mut watch = |step: usize, latent: &ArrayD<f32>| {
            let difference = latent - &expected.index_axis(Axis(0), step);
            worst = difference
                .iter()
                .fold(worst, |worst, value| worst.max(value.abs()));
            seen += 1;
        };
        match class {
            "LCMScheduler" => {
                lcm::sample(table, &times, start, &mut network, &mut draw, &mut watch)
            }
            "TCDScheduler" => {
                let eta = run["step_kwargs"]["eta"].as_f64().unwrap();
                tcd::sample(
                    table,
                    &times,
                    eta,
                    start,
                    &mut network,
                    &mut draw,
                    &mut watch,
                )
            }
            "EulerDiscreteScheduler" => {
                euler::sample(table, &times, start, &mut network, &mut watch)
            }
            "DDIMScheduler" => ddim::sample(
                table,
                &times,
                1000 / times.len(),
                start,
                &mut network,
                &mut watch,
            ),
            other => panic!("{name}: no sampler for {other}"),
        }
        .unwrap();
        assert_eq!(seen, steps, "{name}");
        assert!(noise.is_empty(), "{name} left draws unused");
        assert!(
            worst <= CLOSE * scale,
            "{name}: {worst} apart, largest value {scale}"
        );
        seen_classes.insert(class);
    }
    assert_eq!(seen_classes.len(), 4, "{seen_classes:?}");
}
