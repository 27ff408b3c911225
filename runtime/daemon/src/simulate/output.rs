//! Where the volumes go: a folder, a growing file, a receiver.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::encode::{NIFTI_VOLUMES_AT, nifti_values};
use super::render::part_of;
use super::store::{Store, StoreError};

/// Why a volume did not leave.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutputError {
    /// The folder.
    #[error("cannot write {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The receiver.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One file on its way: a volume, or a slice of one.
#[derive(Debug)]
pub(super) struct Parcel {
    /// A file's name.
    pub(super) name: String,
    /// The whole file.
    pub(super) bytes: Vec<u8>,
    /// How much of it is sent, where not all.
    pub(super) kept_share: Option<f64>,
}

/// Where the volumes go.
pub(super) enum Output {
    /// One file each.
    Folder(PathBuf),
    /// One file per series, by the name of its parcels: how many volumes it has.
    Growing(PathBuf, BTreeMap<String, u16>),
    /// A DICOM receiver.
    Store(Box<Store>),
}

impl Output {
    /// Sends one file.
    pub(super) fn deliver(&mut self, parcel: &Parcel) -> Result<(), OutputError> {
        match self {
            Output::Folder(dir) => {
                let len = parcel.bytes.len();
                let kept = parcel.kept_share.map_or(len, |share| part_of(len, share));
                put(dir, &parcel.name, &parcel.bytes[..kept])
            }
            Output::Growing(dir, volumes) => {
                let volumes = volumes.entry(parcel.name.clone()).or_insert(0);
                *volumes += 1;
                if *volumes == 1 {
                    return put(dir, &parcel.name, &parcel.bytes);
                }
                let path = dir.join(&parcel.name);
                grow(&path, nifti_values(&parcel.bytes), *volumes)
                    .map_err(|source| OutputError::Io { path, source })
            }
            Output::Store(store) => Ok(store.send(&parcel.bytes, parcel.kept_share)?),
        }
    }

    /// Says goodbye.
    pub(super) fn close(self) -> Result<(), OutputError> {
        match self {
            Output::Store(store) => Ok(store.close()?),
            Output::Folder(_) | Output::Growing(..) => Ok(()),
        }
    }
}

/// Writes a file as scanners' exports do: under another name first, then renamed.
fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), OutputError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| OutputError::Io { path, source }
    };
    let temporary = dir.join(format!(".{name}.part"));
    let path = dir.join(name);
    let written = fs::write(&temporary, bytes)
        .map_err(io(&temporary))
        .and_then(|()| fs::rename(&temporary, &path).map_err(io(&path)));
    if written.is_err() {
        // On a full disk a part of a file is worse than none.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Adds a volume: the values first, then the header's count, which so never promises too much.
fn grow(path: &Path, values: &[u8], volumes: u16) -> std::io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(values)?;
    file.flush()?;
    // What is opened for appending writes nowhere else.
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&volumes.to_le_bytes(), NIFTI_VOLUMES_AT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_file_counts_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::Growing(dir.path().into(), BTreeMap::new());
        for volume in 1..=3_u8 {
            let mut bytes = vec![0; 352];
            bytes[48] = 1;
            bytes.extend([volume; 10]);
            let parcel = Parcel {
                name: "001.nii".into(),
                bytes,
                kept_share: None,
            };
            output.deliver(&parcel).unwrap();
            let file = fs::read(dir.path().join("001.nii")).unwrap();
            assert_eq!(file.len(), 352 + 10 * usize::from(volume));
            assert_eq!(file[48..50], [volume, 0]);
            assert_eq!(file.last(), Some(&volume));
        }
    }

    #[test]
    fn truncated_parcel_leaves_a_shorter_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let parcel = Parcel {
            name: "001_000001.dcm".into(),
            bytes: vec![7; 1000],
            kept_share: Some(0.25),
        };
        Output::Folder(dir.path().into()).deliver(&parcel).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(fs::read(names[0].path()).unwrap(), [7; 250]);
    }
}
