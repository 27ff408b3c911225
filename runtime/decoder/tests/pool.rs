//! Pools: against the slow way, against the reference set, and against files that lie.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use decoder::retrieval::{self, EncoderDigest, Pool, PoolError, PoolShape, PoolWriter};
use ndarray::Array2;
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;

const ENCODER: EncoderDigest = EncoderDigest([7; 32]);

fn write(path: &Path, shape: PoolShape, rows: &Array2<f32>) -> Result<(), PoolError> {
    let names: Vec<String> = (0..rows.nrows())
        .map(|at| format!("picture {at}.png"))
        .collect();
    let file = File::create(path).unwrap();
    let mut writer = PoolWriter::begin(&file, shape, &names, ENCODER)?;
    for row in rows.rows() {
        writer.push(row.as_slice().unwrap())?;
    }
    writer.finish()
}

fn shape(tokens: u32, dim: u32, keep_tokens: bool) -> PoolShape {
    PoolShape {
        tokens,
        dim,
        keep_tokens,
    }
}

/// The sum of three uniform numbers: near enough to a bell.
fn noise(rng: &mut ChaCha8Rng) -> f32 {
    let mut sum = 0.0;
    for _ in 0..3 {
        sum += f32::from(u16::try_from(rng.next_u32() >> 16).unwrap()) / 32_768.0 - 1.0;
    }
    sum
}

fn random(rng: &mut ChaCha8Rng, rows: usize, columns: usize) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, columns), || noise(rng))
}

/// Like embeddings of pictures: mostly the same direction, some of a few shared ones, some of their own.
fn correlated(rng: &mut ChaCha8Rng, rows: usize, columns: usize) -> Array2<f32> {
    let (common, themes) = (random(rng, 1, columns), random(rng, 12, columns));
    let weights = random(rng, rows, 12) * 0.3;
    random(rng, rows, columns) * 0.5 + weights.dot(&themes) + common
}

#[test]
fn every_cosine_and_the_order_are_those_of_the_slow_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (tokens, dim) in [(1, 1), (3, 5), (16, 64), (16, 65), (16, 104)] {
        let path = dir.path().join("pool");
        let rows = random(&mut rng, 33, (tokens * dim) as usize);
        write(&path, shape(tokens, dim, true), &rows).unwrap();
        let pool = Pool::open(&path).unwrap();
        assert_eq!((pool.count(), pool.embedding()), (33, [tokens, dim]));
        assert_eq!(
            (pool.name(32), pool.name(33)),
            (Some("picture 32.png"), None)
        );
        assert_eq!((pool.encoder(), pool.keeps_tokens()), (ENCODER, true));
        // What the file holds is rounded to half precision, so that is what the slow way gets.
        let rounded = rows.mapv(|value| half::f16::from_f32(value).to_f32());
        let query = random(&mut rng, 1, rows.ncols());
        let slow = retrieval::similarities(query.view(), rounded.view())
            .row(0)
            .to_owned();
        let found = pool.top(query.as_slice().unwrap(), 40).unwrap();
        assert_eq!(found.len(), 33);
        for hit in &found {
            let expected = slow[hit.index];
            assert!(hit.exact);
            assert!((hit.cosine - expected).abs() < 1e-6, "{hit:?}, {expected}");
        }
        assert!(found.is_sorted_by(|a, b| a.cosine >= b.cosine));
        let fewer = pool.top(query.as_slice().unwrap(), 5).unwrap();
        assert_eq!(fewer, found[..5]);
    }
}

#[test]
fn the_reference_sets_pictures_are_found_in_its_order() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/golden/io_retrieval.safetensors");
    let Ok(bytes) = fs::read(&vectors) else {
        eprintln!("not compared: the reference set ../shared/golden was not found");
        return;
    };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| {
        let view = tensors.tensor(name).unwrap();
        let values: Vec<f32> = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect();
        let rows = view.shape()[0];
        Array2::from_shape_vec((rows, values.len() / rows), values).unwrap()
    };
    let expected: Vec<i64> = {
        let view = tensors.tensor("image_topk_for_brain").unwrap();
        view.data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| i64::from_le_bytes(b))
            .collect()
    };
    let (images, brains) = (floats("clip_pool"), floats("clip_voxels"));
    let scores = floats("image_topk_score_for_brain");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    write(&path, shape(16, 104, true), &images).unwrap();
    let pool = Pool::open(&path).unwrap();
    for (at, brain) in brains.rows().into_iter().enumerate() {
        let found = pool.top(brain.as_slice().unwrap(), 5).unwrap();
        let indices: Vec<i64> = found
            .iter()
            .map(|hit| i64::try_from(hit.index).unwrap())
            .collect();
        assert_eq!(indices, expected[at * 5..at * 5 + 5], "brain {at}");
        for (hit, score) in found.iter().zip(scores.row(at)) {
            // Embeddings are kept in half precision; 1664 roundings of 2^-12 average out to less than this.
            assert!((hit.cosine - score).abs() < 2e-5, "{hit:?}, {score}");
        }
    }
}

#[test]
fn sketches_err_as_little_as_they_promise() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (name, centred) in [("random", false), ("correlated", true)] {
        let rows = if centred {
            correlated(&mut rng, 2000, 4096)
        } else {
            random(&mut rng, 2000, 4096)
        };
        let path = dir.path().join(name);
        write(&path, shape(16, 256, false), &rows).unwrap();
        let pool = Pool::open(&path).unwrap();
        assert!(!pool.keeps_tokens());
        let query = &rows.row(77) + &(random(&mut rng, 1, 4096).row(0).to_owned() * 0.3);
        let slow = retrieval::similarities(query.view().insert_axis(ndarray::Axis(0)), rows.view());
        let found = pool.top(query.as_slice().unwrap(), 2000).unwrap();
        let (mut bias, mut square) = (0.0_f64, 0.0_f64);
        for hit in &found {
            assert!(!hit.exact);
            let error = f64::from(hit.cosine - slow[[0, hit.index]]);
            bias += error / 2000.0;
            square += error * error / 2000.0;
        }
        let std_dev = square.sqrt();
        eprintln!("{name}: bias {bias:.5}, standard deviation {std_dev:.5}");
        // 1 / sqrt(1024) = 0.031 for unrelated rows. Of the correlated ones 1 / 2.33 is the common direction,
        // which is exact: 0.57 of the error is left, and 0.018 is little more than half of what sketches of
        // the whole embeddings would err by. One query's errors are not independent: a tenth is allowed.
        let bound = if centred { 0.0196 } else { 0.0344 };
        assert!(
            std_dev < bound && bias.abs() < bound / 3.0,
            "{name}: {bias} {std_dev}"
        );
        assert_eq!(found[0].index, 77, "{name}");
    }
}

#[test]
fn candidates_of_the_sketches_hold_nearly_all_that_is_sought() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    // More values than are compared exactly: 2^27 / 8192 = 16,384 pictures.
    let rows = correlated(&mut rng, 17_000, 8192);
    let path = dir.path().join("pool");
    write(&path, shape(32, 256, true), &rows).unwrap();
    let pool = Pool::open(&path).unwrap();
    let (mut met, mut sought) = (0, 0);
    for target in [3, 999, 5000, 16_999] {
        let query = &rows.row(target) + &random(&mut rng, 1, 8192).row(0);
        let slow = retrieval::similarities(query.view().insert_axis(ndarray::Axis(0)), rows.view());
        let expected = retrieval::top(&slow.row(0).to_owned(), 5);
        let found = pool.top(query.as_slice().unwrap(), 5).unwrap();
        assert!(found.iter().all(|hit| hit.exact));
        assert_eq!(found[0].index, expected[0]);
        sought += expected.len();
        met += expected
            .iter()
            .filter(|&&index| found.iter().any(|hit| hit.index == index))
            .count();
    }
    eprintln!("recall at 5: {met} of {sought}");
    assert!(met * 20 >= sought * 19, "{met} of {sought}");
}

#[test]
fn a_picture_of_zeros_resembles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let mut rows = Array2::zeros((3, 8));
    rows.row_mut(2).fill(2.0);
    write(&path, shape(2, 4, true), &rows).unwrap();
    let pool = Pool::open(&path).unwrap();
    let cosines = |query: &[f32]| -> Vec<(usize, f32)> {
        let found = pool.top(query, 9).unwrap();
        found.iter().map(|hit| (hit.index, hit.cosine)).collect()
    };
    assert_eq!(cosines(&[1.0; 8]), [(2, 1.0), (0, 0.0), (1, 0.0)]);
    assert_eq!(cosines(&[0.0; 8]), [(0, 0.0), (1, 0.0), (2, 0.0)]);
}

#[test]
fn questions_and_pictures_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let rows = Array2::from_elem((2, 6), 1.0_f32);
    write(&path, shape(2, 3, true), &rows).unwrap();
    let pool = Pool::open(&path).unwrap();
    let message = |error: PoolError| error.to_string();
    assert_eq!(
        message(pool.top(&[1.0; 5], 1).unwrap_err()),
        "embedding: expected 2 x 3 values, found 5"
    );
    assert_eq!(
        message(
            pool.top(&[1.0, 1.0, f32::NAN, 1.0, 1.0, 1.0], 1)
                .unwrap_err()
        ),
        "embedding value 2: expected a finite number, found NaN"
    );
    let file = File::create(dir.path().join("other")).unwrap();
    let begin = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        PoolWriter::begin(&file, shape(1, 2, true), &names, ENCODER)
    };
    assert!(message(begin(&["a\nb"]).unwrap_err()).starts_with("name 0: expected 1 to 1024 bytes"));
    let mut writer = begin(&["a"]).unwrap();
    assert_eq!(
        message(writer.push(&[1.0, 1e5]).unwrap_err()),
        "embedding 0, value 1: expected a number of half precision, found 100000"
    );
    assert_eq!(
        message(writer.push(&[1.0]).unwrap_err()),
        "embedding 0: expected 1 x 2 values, found 1"
    );
    writer.push(&[1.0, 2.0]).unwrap();
    assert_eq!(
        message(writer.push(&[1.0, 2.0]).unwrap_err()),
        "count: expected 1 pictures, found one more"
    );
    let unfinished = begin(&["a", "b"]).unwrap().finish().unwrap_err();
    assert_eq!(message(unfinished), "count: expected 2 pictures, found 0");
}

/// A small sound pool with sketches and tokens.
fn sound(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = dir.join("pool");
    let rows = random(&mut ChaCha8Rng::seed_from_u64(1), 3, 1030);
    write(&path, shape(2, 515, true), &rows).unwrap();
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

#[test]
fn hostile_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = sound(dir.path());
    let opened = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Pool::open(&path)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    assert_eq!(opened(&bytes), Ok(()));
    let with = |at: usize, value: &[u8]| {
        let mut changed = bytes.clone();
        changed[at..at + value.len()].copy_from_slice(value);
        opened(&changed).unwrap_err()
    };
    assert_eq!(
        opened(b"").unwrap_err(),
        "header: expected 128 bytes, found an empty file"
    );
    assert_eq!(
        opened(&bytes[..127]).unwrap_err(),
        "header: expected 128 bytes, found 127"
    );
    assert!(with(0, b"PK").starts_with("magic: expected a pool"));
    assert_eq!(with(8, &[2]), "version: expected 1, found 2");
    assert_eq!(with(12, &[0; 4]), "tokens: expected 1..=65536, found 0");
    assert_eq!(
        with(16, &[255; 4]),
        "dim: expected 1..=65536, found 4294967295"
    );
    assert_eq!(
        with(20, &[255; 4]),
        "sketch length: expected 0..=65536, found 4294967295"
    );
    assert_eq!(with(24, &[2]), "exact: expected 0..=1, found 2");
    assert_eq!(with(28, &[1]), "reserved: expected 0..=0, found 1");
    assert_eq!(
        with(32, &[0; 8]),
        "count: expected at least 1 picture, found 0"
    );
    // Lengths that would not fit memory, or 64 bits, are compared with the file before anything is held.
    assert!(with(32, &[255; 8]).starts_with("length in bytes: expected countless"));
    assert!(with(38, &[1]).starts_with("length in bytes: expected "));
    assert!(with(40, &[255; 8]).starts_with("length in bytes: expected countless"));
    assert!(with(48, &[1]).starts_with("SHA-256 of header and names: expected "));
    assert!(with(70, &[1]).starts_with("SHA-256 of header and names: expected "));
    assert!(with(4096, b"X").starts_with("SHA-256 of header and names: expected "));
    for end in [128, 4096, 5000, bytes.len() - 1] {
        assert!(
            opened(&bytes[..end])
                .unwrap_err()
                .starts_with("length in bytes: expected ")
        );
    }
    let longer = [bytes.as_slice(), b"x"].concat();
    assert!(
        opened(&longer)
            .unwrap_err()
            .starts_with("length in bytes: expected ")
    );
    assert!(
        Pool::open(dir.path())
            .unwrap_err()
            .to_string()
            .starts_with("file: expected a plain file")
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Numbers may be anything: nothing panics, and what is found is sorted and within -1..=1.
    #[test]
    fn flipped_bytes_among_the_numbers_do_no_harm(flips in prop::collection::vec((8192_usize..40_000, any::<u8>()), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut bytes) = sound(dir.path());
        for (at, value) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        fs::write(&path, &bytes).unwrap();
        let found = Pool::open(&path).unwrap().top(&[0.5; 1030], 3).unwrap();
        prop_assert_eq!(found.len(), 3);
        prop_assert!(found.iter().all(|hit| (-1.0..=1.0).contains(&hit.cosine)));
        prop_assert!(found.is_sorted_by(|a, b| a.cosine >= b.cosine));
    }

    /// Any flipped byte of header or names is refused.
    #[test]
    fn a_flipped_byte_of_header_or_names_is_refused(at in 0_usize..128 + 42, flip in 1_u8..) {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut bytes) = sound(dir.path());
        let at = if at < 128 { at } else { 4096 + at - 128 };
        bytes[at] ^= flip;
        fs::write(&path, &bytes).unwrap();
        prop_assert!(Pool::open(&path).is_err());
    }
}
