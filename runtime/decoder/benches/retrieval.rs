//! The pictures of a pool that resemble an embedding most: 100,000 of them, and a plain loop beside it.
//!
//! `cargo bench -p decoder --bench retrieval`. A pool of that size keeps sketches of 1024 values; how
//! long the embedding's own sketch takes at the released size is measured apart, with a small pool.

#![expect(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use decoder::retrieval::{EncoderDigest, Pool, PoolShape, PoolWriter};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const PICTURES: usize = 100_000;

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    let mut number = || f32::from(u16::try_from(rng.next_u32() >> 16).unwrap()) / 32_768.0 - 1.0;
    (0..len).map(|_| number()).collect()
}

fn pool(path: &Path, pictures: usize, [tokens, dim]: [u32; 2], keep_tokens: bool) -> Pool {
    let names: Vec<String> = (0..pictures).map(|at| format!("{at}.png")).collect();
    let shape = PoolShape {
        tokens,
        dim,
        keep_tokens,
    };
    let file = File::create(path).unwrap();
    let mut writer = PoolWriter::begin(&file, shape, &names, EncoderDigest([0; 32])).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..pictures {
        writer
            .push(&random(&mut rng, (tokens * dim) as usize))
            .unwrap();
    }
    writer.finish().unwrap();
    Pool::open(path).unwrap()
}

/// What anybody writes first, on the numbers in single precision.
fn plain(rows: &[f32], query: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut found: Vec<(usize, f32)> = rows
        .chunks_exact(query.len())
        .map(|row| row.iter().zip(query).map(|(a, b)| a * b).sum::<f32>())
        .enumerate()
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found.truncate(count);
    found
}

fn retrieval(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut group = criterion.benchmark_group("retrieval");
    group
        .sample_size(20)
        .measurement_time(Duration::from_secs(4));

    let large = pool(&dir.path().join("large"), PICTURES, [8, 256], false);
    let query = random(&mut rng, 2048);
    group.bench_function(
        "top 5 of 100,000 sketches, fp16, mapped, two threads",
        |bench| {
            bench.iter(|| large.top(black_box(&query), 5).unwrap());
        },
    );
    drop(large);

    let rows = random(&mut rng, PICTURES * 1024);
    let query = random(&mut rng, 1024);
    group.bench_function("top 5 of 100,000 rows of 1024, plain fp32 loop", |bench| {
        bench.iter(|| plain(black_box(&rows), black_box(&query), 5));
    });
    drop(rows);

    let released = pool(&dir.path().join("sketches"), 2, [256, 1664], false);
    let query = random(&mut rng, 256 * 1664);
    group.bench_function("sketch of one embedding of 256 x 1664", |bench| {
        bench.iter(|| released.top(black_box(&query), 1).unwrap());
    });

    let whole = pool(&dir.path().join("tokens"), 300, [256, 1664], true);
    group.bench_function("top 5 of 300 pictures, all tokens of 256 x 1664", |bench| {
        bench.iter(|| whole.top(black_box(&query), 5).unwrap());
    });
    group.finish();
}

criterion_group!(benches, retrieval);
criterion_main!(benches);
