//! `pool` end to end: pictures made here, a bundle from the reference set, the file asked for what is in it.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};

use bundle::Precision;
use decoder::retrieval::Pool;
use export::check::Vectors;
use export::export::export;
use export::plan::Plan;
use export::pool::{EmbedError, PoolOptions, PoolSummary, embed};
use image::{ImageBuffer, ImageFormat, Rgb, RgbImage};
use ndarray::{ArrayD, Axis, Ix3};

fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

/// A bundle of the reference set's image encoder and what else its checkpoint holds.
fn bundle(golden: &Path, dir: &Path) -> PathBuf {
    let out = dir.join("bundle");
    let plan = Plan::from_folder(golden, Precision::Fp32, false).unwrap();
    export(&plan, &out, &mut |_| {}).unwrap();
    out
}

fn options(bundle: &Path, images: &Path, out: &Path) -> PoolOptions {
    PoolOptions {
        bundle: bundle.into(),
        images: images.into(),
        out: out.into(),
        exact: false,
        onnxruntime: None,
    }
}

/// One recorded picture as a PNG of 16 bits a channel, to which its intensities round by 8e-6.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "intensities of 0..=1 times 65535"
)]
fn save(images: &ArrayD<f32>, at: usize, path: &Path) {
    let image = images
        .index_axis(Axis(0), at)
        .into_dimensionality::<Ix3>()
        .unwrap();
    let (_, rows, columns) = image.dim();
    let size = (
        u32::try_from(columns).unwrap(),
        u32::try_from(rows).unwrap(),
    );
    let buffer = ImageBuffer::from_fn(size.0, size.1, |x, y| {
        Rgb([0, 1, 2].map(|channel| {
            let value = image[[channel, y as usize, x as usize]];
            (value.clamp(0.0, 1.0) * 65_535.0).round() as u16
        }))
    });
    buffer.save(path).unwrap();
}

fn left_behind(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn pictures_are_found_by_the_tokens_that_were_recorded_for_them() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden, dir.path());
    let vectors = Vectors::read(&golden, "clip_vision").unwrap().unwrap();
    let images = dir.path().join("images");
    fs::create_dir_all(images.join("more")).unwrap();
    for at in 0..3 {
        save(
            vectors.floats("images_224").unwrap(),
            at,
            &images.join(format!("{at}.png")),
        );
    }
    save(
        vectors.floats("image_odd").unwrap(),
        0,
        &images.join("more/odd.PNG"),
    );
    fs::write(images.join("notes.txt"), "no picture").unwrap();
    // A third kind and size: a JPEG of one colour.
    RgbImage::from_pixel(37, 301, Rgb([200, 30, 90]))
        .save(images.join("grey.jpg"))
        .unwrap();

    let target = dir.path().join("out");
    fs::create_dir(&target).unwrap();
    let out = target.join("embeddings.bin");
    let mut said = Vec::new();
    let mut say = |line: &str| said.push(line.to_owned());
    let summary = embed(&options(&bundle, &images, &out), &mut say).unwrap();
    assert_eq!(
        summary,
        PoolSummary {
            pictures: 5,
            exact: true,
            len_bytes: fs::metadata(&out).unwrap().len()
        }
    );
    assert!(
        said.iter()
            .any(|line| line.starts_with("1 files are neither")),
        "{said:?}"
    );
    assert!(
        said.iter().any(|line| line.starts_with("embedded 5 of 5")),
        "{said:?}"
    );
    assert_eq!(left_behind(&target), ["embeddings.bin"]);

    let pool = Pool::open(&out).unwrap();
    let names: Vec<&str> = (0..5).map(|at| pool.name(at).unwrap()).collect();
    assert_eq!(
        names,
        ["0.png", "1.png", "2.png", "grey.jpg", "more/odd.PNG"]
    );
    assert_eq!(pool.embedding(), [16, 104]);
    let verified = bundle::open(&bundle).unwrap().verify_hashes().unwrap();
    pool.check_encoder(&verified).unwrap();
    let found = |tokens: &ArrayD<f32>, at: usize| {
        let tokens: Vec<f32> = tokens.index_axis(Axis(0), at).iter().copied().collect();
        let hit = pool.top(&tokens, 1).unwrap()[0];
        // Half precision costs 1e-7 of the cosine, another preprocessing 1e-3 and more.
        assert!(hit.cosine > 0.999_999, "{hit:?}");
        pool.name(hit.index).unwrap().to_owned()
    };
    for at in 0..3 {
        assert_eq!(
            found(vectors.floats("tokens").unwrap(), at),
            format!("{at}.png")
        );
    }
    assert_eq!(
        found(vectors.floats("tokens_odd").unwrap(), 0),
        "more/odd.PNG"
    );

    // Written once, and the same bytes each time.
    let again = embed(&options(&bundle, &images, &out), &mut |_| {}).unwrap_err();
    assert!(matches!(again, EmbedError::Exists { .. }), "{again}");
    let second = target.join("second.bin");
    embed(&options(&bundle, &images, &second), &mut |_| {}).unwrap();
    assert_eq!(fs::read(&out).unwrap(), fs::read(&second).unwrap());
}

#[test]
fn all_pictures_that_cannot_be_read_are_named_and_nothing_is_written() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(&golden, dir.path());
    let (images, target) = (dir.path().join("images"), dir.path().join("target"));
    fs::create_dir(&images).unwrap();
    fs::create_dir(&target).unwrap();
    let refused = || {
        let error = embed(
            &options(&bundle, &images, &target.join("pool")),
            &mut |_| {},
        );
        assert!(left_behind(&target).is_empty());
        error.unwrap_err().to_string()
    };
    assert!(refused().contains("expected PNG or JPEG files, found 0 other files"));
    let sound = RgbImage::from_pixel(20, 10, Rgb([1, 2, 3]));
    sound.save(images.join("sound.png")).unwrap();
    let bytes = fs::read(images.join("sound.png")).unwrap();
    fs::write(images.join("cut.png"), &bytes[..bytes.len() / 2]).unwrap();
    fs::write(images.join("empty.jpg"), b"").unwrap();
    fs::write(images.join("text.jpeg"), b"<html>").unwrap();
    sound
        .save_with_format(images.join("bmp.png"), ImageFormat::Png)
        .unwrap();
    let mut huge = bytes.clone();
    huge[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    fs::write(images.join("huge.png"), huge).unwrap();
    let message = refused();
    assert!(
        message.starts_with("4 of 6 pictures cannot be used, nothing was written:\n"),
        "{message}"
    );
    for name in [
        "cut.png: ",
        "empty.jpg: expected PNG or JPEG",
        "huge.png: ",
        "text.jpeg: expected PNG or JPEG",
    ] {
        assert!(message.contains(name), "{name} is missing in {message}");
    }
}

#[test]
fn a_bundle_that_cannot_embed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (images, out) = (dir.path().join("images"), dir.path().join("pool"));
    fs::create_dir(&images).unwrap();
    RgbImage::new(4, 4).save(images.join("black.png")).unwrap();
    let error = embed(
        &options(&dir.path().join("nowhere"), &images, &out),
        &mut |_| {},
    );
    assert_eq!(error.unwrap_err().to_string(), "the bundle cannot be used");
    let Some(golden) = golden() else { return };
    let bundle = dir.path().join("legacy");
    let recipe = dir.path().join("recipe.toml");
    let text = format!(
        "precision = \"fp32\"\n[sources]\nmindeye = {:?}\n",
        golden.join("last_legacy.pth")
    );
    fs::write(&recipe, text).unwrap();
    export(&Plan::from_recipe(&recipe).unwrap(), &bundle, &mut |_| {}).unwrap();
    let error = embed(&options(&bundle, &images, &out), &mut |_| {}).unwrap_err();
    assert!(matches!(error, EmbedError::NoEncoder { .. }), "{error}");
    assert!(!out.exists());
}
