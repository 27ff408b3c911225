//! NIfTI images, plain and packed: any bytes give an image or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rtfmri::nifti::{self, Header, MAX_VOLUME_VOXELS, MAX_VOXELS};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::read(bytes) {
        let voxels: usize = header.shape.iter().product();
        assert!(voxels <= MAX_VOXELS);
        assert!(header.complete(0) == 0);
    }
    for index in [0, 1] {
        match nifti::read_volume(bytes, index) {
            Ok((header, volume)) => {
                assert!(index < header.volumes);
                assert!(volume.voxels.len() <= MAX_VOLUME_VOXELS);
                assert!(volume.voxels.iter().all(|value| value.is_finite()));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    if let Ok(image) = nifti::read(bytes) {
        assert!(image.values.len() <= MAX_VOXELS);
    }
});
