//! What the fuzz targets share: a file to put the input into, and what is done with a checkpoint.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use export::checkpoint::{Checkpoint, CheckpointError, inspect};
use tempfile::NamedTempFile;

/// Numbers of one checkpoint that are read; a view may repeat few bytes many times.
const MAX_READ: u64 = 1 << 22;

/// The path of a file with these bytes, the same file each time, in memory.
pub fn with_file<T>(bytes: &[u8], use_it: impl FnOnce(&Path) -> T) -> T {
    static SCRATCH: OnceLock<Mutex<NamedTempFile>> = OnceLock::new();
    let scratch = SCRATCH.get_or_init(|| {
        let file = NamedTempFile::new_in("/dev/shm").or_else(|_| NamedTempFile::new());
        Mutex::new(file.expect("a temporary file"))
    });
    let scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let file: &File = scratch.as_file();
    file.set_len(bytes.len() as u64).expect("room in memory");
    file.write_all_at(bytes, 0).expect("room in memory");
    use_it(scratch.path())
}

/// Opens a checkpoint, lists it, and reads every tensor; errors are as good as success.
pub fn read_checkpoint(bytes: &[u8]) {
    with_file(bytes, |path| {
        let checkpoint = match Checkpoint::open(path) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                speak(&error);
                return;
            }
        };
        assert!(!inspect::render(&checkpoint).is_empty());
        let mut left = MAX_READ;
        let sections: Vec<String> = checkpoint.sections().map(|(name, _)| name.to_owned()).collect();
        for name in sections {
            for (key, tensor) in checkpoint.section(&name).expect("it was listed") {
                let elements = tensor.elements();
                if elements > left {
                    continue;
                }
                left -= elements;
                match tensor.read_f32() {
                    Ok(values) => assert_eq!(values.len() as u64, elements, "{key}"),
                    Err(error) => speak(&error),
                }
            }
        }
    });
}

/// An error's message must be there, and must not repeat the whole file.
fn speak(error: &CheckpointError) {
    assert!(!error.to_string().is_empty());
}
