//! Scanner files: any bytes give a volume, a slice or an error; a slice is taken by an assembler or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rtfmri::assembly::{Assembler, Limits};
use rtfmri::dicom::{Image, decode};

fuzz_target!(|bytes: &[u8]| {
    match decode(bytes) {
        Ok(Image::Volume(volume)) => {
            // A voxel has two bytes in the file.
            assert!(volume.voxels.len() * 2 <= bytes.len());
            assert!(volume.header.tr_ms > 0.0);
            assert!(volume.affine_lps.iter().flatten().all(|value| value.is_finite()));
        }
        Ok(Image::Slice(slice)) => {
            assert!(slice.pixels.len() * 2 <= bytes.len());
            let mut assembler = Assembler::new(Limits::default());
            let _ = assembler.add(slice.clone());
            let _ = assembler.add(slice);
            let _ = assembler.finish();
            let _ = assembler.incomplete();
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
