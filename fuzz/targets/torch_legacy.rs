//! The legacy container of `torch.save`: the input follows magic number, protocol and system, or is the file.
#![no_main]

use libfuzzer_sys::fuzz_target;

const HEAD: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00.";

fuzz_target!(|bytes: &[u8]| {
    fuzz::read_checkpoint(bytes);
    fuzz::read_checkpoint(&[HEAD, bytes].concat());
});
