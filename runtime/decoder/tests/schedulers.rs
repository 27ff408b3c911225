//! Few-step samplers against recorded runs of diffusers, step by step.
//!
//! The recordings lie beside the repository (`../shared/golden`); a clone without them says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::VecDeque;
use std::path::Path;

use bundle::EdmSchedule;
use decoder::sampler::{SigmaTable, lcm};
use ndarray::{ArrayD, Axis};
use safetensors::SafeTensors;

/// Latents of a few units in single precision, up to eight steps of a few operations each.
const CLOSE: f32 = 2e-5;

fn tensor(file: &SafeTensors<'_>, name: &str) -> Option<ArrayD<f32>> {
    let view = file.tensor(name).ok()?;
    let bytes = view.data().chunks_exact(4);
    let values = bytes
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    Some(ArrayD::from_shape_vec(view.shape().to_vec(), values).unwrap())
}

#[test]
fn lcm_follows_the_recorded_scheduler() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/golden/io_schedulers.safetensors");
    let Ok(bytes) = std::fs::read(path) else {
        eprintln!("not compared: the recorded schedulers in ../shared/golden were not found");
        return;
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let schedule = EdmSchedule {
        linear_start: 0.00085,
        linear_end: 0.012,
        steps: 1000,
    };
    let table = SigmaTable::new(&schedule);
    for steps in [1, 2, 4, 8] {
        let of = |what: &str| tensor(&file, &format!("lcm_{steps}/{what}"));
        let expected = of("x_per_step").unwrap();
        let mut noise: VecDeque<ArrayD<f32>> = of("noise")
            .map(|draws| {
                draws
                    .axis_iter(Axis(0))
                    .map(|draw| draw.to_owned())
                    .collect()
            })
            .unwrap_or_default();
        let mut worst = 0.0_f32;
        let mut seen = 0;
        lcm::sample(
            &table,
            steps,
            of("x_init").unwrap(),
            &mut |latent, _| Ok(latent * 0.1 + 0.05),
            &mut || noise.pop_front().expect("one draw between two steps"),
            &mut |step, latent| {
                let difference = latent - &expected.index_axis(Axis(0), step);
                worst = difference
                    .iter()
                    .fold(worst, |worst, value| worst.max(value.abs()));
                seen += 1;
            },
        )
        .unwrap();
        assert_eq!(seen, steps);
        assert!(noise.is_empty(), "{steps} steps left draws unused");
        assert!(worst <= CLOSE, "{steps} steps: {worst} apart");
    }
}
