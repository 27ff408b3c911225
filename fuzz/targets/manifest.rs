//! A bundle's manifest: what is accepted is written and read again as the same.
#![no_main]

use bundle::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::from_json(bytes) {
        let written = manifest.to_json().expect("it was valid");
        let again = Manifest::from_json(&written).expect("what is written can be read");
        assert_eq!(manifest, again);
        assert_eq!(written, again.to_json().expect("it was valid"), "written twice");
    }
});
