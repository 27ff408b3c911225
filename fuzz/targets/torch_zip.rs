//! The zip container of `torch.save`: the input is the file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::read_checkpoint(bytes));
