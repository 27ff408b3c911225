//! The safetensors container: the input is the file behind the length of its header.
#![no_main]

use libfuzzer_sys::fuzz_target;

// The first two bytes say how much is header, so that a mutation of the text does not end at the length.
fuzz_target!(|bytes: &[u8]| {
    fuzz::read_checkpoint(bytes);
    let Some((len, rest)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
    let mut file = (len as u64).to_le_bytes().to_vec();
    file.extend_from_slice(rest);
    fuzz::read_checkpoint(&file);
});
