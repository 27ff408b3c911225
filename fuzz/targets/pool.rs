//! Pools of pictures: the input is the file; once as it is, once with the digest put right.
#![no_main]

use decoder::retrieval::Pool;
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

fn ask(bytes: &[u8]) {
    fuzz::with_file(bytes, |path| match Pool::open(path) {
        Ok(pool) => {
            let [tokens, dim] = pool.embedding();
            let query = vec![0.5; (tokens * dim) as usize];
            let found = pool.top(&query, 3).expect("the embedding fits");
            assert_eq!(found.len(), pool.count().min(3));
            assert!(found.iter().all(|hit| (-1.0..=1.0).contains(&hit.cosine)));
            assert!(found.iter().all(|hit| pool.name(hit.index).is_some()));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    });
}

/// The digest of header and names, where they are.
fn put_right(bytes: &mut [u8]) -> Option<()> {
    let len = u64::from_le_bytes(*bytes.get(40..48)?.first_chunk()?);
    let end = usize::try_from(len).ok()?.checked_add(4096)?;
    let mut hasher = Sha256::new();
    hasher.update(bytes.get(..96)?);
    hasher.update(bytes.get(4096..end)?);
    bytes.get_mut(96..128)?.copy_from_slice(&hasher.finalize());
    Some(())
}

fuzz_target!(|bytes: &[u8]| {
    ask(bytes);
    let mut bytes = bytes.to_vec();
    if put_right(&mut bytes).is_some() {
        ask(&bytes);
    }
});
