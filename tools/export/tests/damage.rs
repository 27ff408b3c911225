//! Checkpoints cut short or with any byte changed never crash the reader.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};

use export::checkpoint::Checkpoint;
use proptest::prelude::*;

fn sample(name: &str) -> Option<Vec<u8>> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/golden")
        .join(name);
    fs::read(path).ok()
}

/// Opens a file with these bytes and reads every tensor; an error is as good as a result.
fn read_all(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    fs::write(&path, bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(&path) else {
        return;
    };
    for section in ["model_state_dict", "state_dict"] {
        let Ok(tensors) = checkpoint.section(section) else {
            continue;
        };
        for (_, tensor) in tensors {
            if tensor.elements() < 1 << 22 {
                let _ = tensor.read_f32();
            }
        }
    }
}

const SAMPLES: [&str; 3] = [
    "hostile/control_ok.pth",
    "last_legacy.pth",
    "hostile/st_control_ok.safetensors",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn changed_bytes_never_crash(
        which in 0..SAMPLES.len(),
        // Most of the structure is near the ends.
        places in prop::collection::vec((0_usize..4096, any::<bool>(), any::<u8>()), 1..8),
    ) {
        let Some(mut bytes) = sample(SAMPLES[which]) else { return Ok(()) };
        let len = bytes.len();
        for (offset, from_end, value) in places {
            let at = if from_end { len - 1 - offset % len } else { offset % len };
            bytes[at] = value;
        }
        read_all(&bytes);
    }

    #[test]
    fn cut_files_never_crash(which in 0..SAMPLES.len(), share in 0.0..1.0_f64) {
        let Some(bytes) = sample(SAMPLES[which]) else { return Ok(()) };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a small file")]
        let len = (bytes.len() as f64 * share) as usize;
        read_all(&bytes[..len]);
    }
}
