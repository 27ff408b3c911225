//! A bundle written, signed, verified; and everything that must be refused.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::{
    BundleError, BundleWriter, DType, Dim, FORMAT_VERSION, Manifest, Precision, PublicKey,
    SecretKey, Stage, StageName, Subject, TensorSpec, WriteError, generate_keys,
};
use proptest::prelude::*;

fn spec(name: &str, shape: &[u64]) -> TensorSpec {
    let mut dims = vec![Dim::BATCH];
    dims.extend(shape.iter().map(|&len| Dim::Fixed(len)));
    TensorSpec {
        name: name.into(),
        dtype: DType::F32,
        shape: dims,
    }
}

fn manifest() -> Manifest {
    let backbone = Stage {
        graph: "graphs/backbone.onnx".into(),
        weights: Some("weights/backbone.bin".into()),
        inputs: vec![spec("ridge", &[1, 8])],
        outputs: vec![spec("brain_tokens", &[4, 6])],
        working_bytes: 0,
    };
    let ridge = Stage {
        graph: "subjects/subj01/ridge.onnx".into(),
        weights: None,
        inputs: vec![spec("betas", &[20])],
        outputs: vec![spec("ridge", &[1, 8])],
        working_bytes: 0,
    };
    Manifest {
        format_version: FORMAT_VERSION,
        bundle_version: 3,
        family: "mindeye2".into(),
        precision: Precision::Fp16,
        random_weights: true,
        stages: BTreeMap::from([(StageName::Backbone, backbone)]),
        subjects: vec![Subject {
            id: "subj01".into(),
            index: 0,
            voxels: 20,
            stage: ridge,
            mask: None,
        }],
        blurry: None,
        prior: None,
        unclip: None,
        refiner: None,
        tokenizers: None,
        audit: None,
        sources: Vec::new(),
        loras: Vec::new(),
        licences: vec!["MIT".into()],
        files: BTreeMap::new(),
    }
}

struct Signed {
    _root: tempfile::TempDir,
    dir: PathBuf,
    key: PublicKey,
}

fn signed() -> Signed {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("bundle");
    let mut writer = BundleWriter::create(&dir).unwrap();
    writer.add("graphs/backbone.onnx", b"graph").unwrap();
    writer.add("subjects/subj01/ridge.onnx", b"ridge").unwrap();
    let mut weights = writer.weights("weights/backbone.bin").unwrap();
    weights.write(&[1, 2, 3]);
    assert_eq!(weights.align(), 4096);
    weights.write(&[4; 100]);
    writer.close(weights).unwrap();
    writer.finish(manifest()).unwrap();
    let (secret, public) = (root.path().join("key"), root.path().join("key.pub"));
    let key = generate_keys(&secret, &public, None).unwrap();
    bundle::sign(&dir, &SecretKey::from_file(&secret, None).unwrap()).unwrap();
    assert_eq!(PublicKey::from_file(&public).unwrap().id(), key.id());
    Signed {
        _root: root,
        dir,
        key,
    }
}

fn verify(dir: &Path, key: &PublicKey) -> Result<bundle::Bundle, BundleError> {
    bundle::open(dir)?.verify(key)
}

#[test]
fn written_signed_bundle_verifies_and_lists_its_files() {
    let signed = signed();
    let bundle = verify(&signed.dir, &signed.key).unwrap();
    assert_eq!(bundle.manifest().files.len(), 3);
    assert_eq!(
        bundle.manifest().files["weights/backbone.bin"].len_bytes,
        4196
    );
    assert!(bundle.file("graphs/backbone.onnx").unwrap().is_file());
    assert_eq!(bundle.file("manifest.json"), None);
    assert_eq!(bundle.file("../key"), None);
}

#[test]
fn unfinished_bundle_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = BundleWriter::create(&root.path().join("bundle")).unwrap();
    writer.add("graphs/a.onnx", b"a").unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn existing_folder_is_never_overwritten() {
    let signed = signed();
    assert!(matches!(
        BundleWriter::create(&signed.dir),
        Err(WriteError::Exists { .. })
    ));
}

#[test]
fn other_key_is_refused() {
    let (one, two) = (signed(), signed());
    assert!(matches!(
        verify(&one.dir, &two.key),
        Err(BundleError::Signature { .. })
    ));
}

#[test]
fn unsigned_bundle_is_refused_by_verify_and_passes_hash_check() {
    let signed = signed();
    fs::remove_file(signed.dir.join("manifest.json.minisig")).unwrap();
    assert!(matches!(
        verify(&signed.dir, &signed.key),
        Err(BundleError::Unsigned { .. })
    ));
    bundle::open(&signed.dir).unwrap().verify_hashes().unwrap();
}

#[test]
fn unlisted_file_is_refused_and_engine_cache_is_not() {
    let signed = signed();
    fs::create_dir(signed.dir.join("engines")).unwrap();
    fs::write(signed.dir.join("engines/sm_87.plan"), b"cache").unwrap();
    verify(&signed.dir, &signed.key).unwrap();
    fs::write(signed.dir.join("graphs/extra.onnx"), b"x").unwrap();
    assert!(matches!(
        verify(&signed.dir, &signed.key),
        Err(BundleError::Unlisted { .. })
    ));
}

#[test]
fn link_in_place_of_a_file_is_refused() {
    let signed = signed();
    let path = signed.dir.join("graphs/backbone.onnx");
    let elsewhere = signed.dir.parent().unwrap().join("elsewhere");
    fs::rename(&path, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert!(matches!(
        verify(&signed.dir, &signed.key),
        Err(BundleError::Unlisted { .. })
    ));
}

#[test]
fn manifest_errors_name_field_expected_and_found() {
    let refused = |change: &dyn Fn(&mut serde_json::Value), words: &[&str]| {
        let signed = signed();
        let text = fs::read(signed.dir.join("manifest.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        change(&mut json);
        let error = Manifest::from_json(&serde_json::to_vec(&json).unwrap()).unwrap_err();
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            message = format!("{message}: {inner}");
            source = inner.source();
        }
        for word in words {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    };
    refused(
        &|json| json["format_version"] = 9.into(),
        &["format_version", "9", "1"],
    );
    refused(&|json| json["surprise"] = 9.into(), &["surprise"]);
    refused(
        &|json| json["stages"]["backbone"]["graph"] = "../../etc/passwd".into(),
        &["stages.backbone.graph", "files", "../../etc/passwd"],
    );
    refused(
        &|json| json["files"]["../up"] = json["files"]["graphs/backbone.onnx"].clone(),
        &["files", "../up"],
    );
    refused(
        &|json| json["subjects"][0]["voxels"] = 21.into(),
        &["subjects[0].voxels", "20", "21"],
    );
    refused(
        &|json| json["subjects"][0]["id"] = "a/b".into(),
        &["subjects[0].id", "a/b"],
    );
}

#[test]
fn manifest_written_and_read_is_the_same() {
    let signed = signed();
    let bytes = fs::read(signed.dir.join("manifest.json")).unwrap();
    assert_eq!(
        Manifest::from_json(&bytes).unwrap().to_json().unwrap(),
        bytes
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_changed_byte_is_refused(file in 0_usize..5, position in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let signed = signed();
        let names = ["manifest.json", "manifest.json.minisig", "graphs/backbone.onnx", "subjects/subj01/ridge.onnx", "weights/backbone.bin"];
        let path = signed.dir.join(names[file]);
        let mut bytes = fs::read(&path).unwrap();
        let at = position.index(bytes.len());
        let before = bytes[at];
        bytes[at] ^= 1 << bit;
        // The first line of a signature is an untrusted comment that minisign does not sign, by design.
        let comment_ends = bytes.iter().position(|&b| b == b'\n').unwrap_or(0);
        prop_assume!(names[file] != "manifest.json.minisig" || at > comment_ends);
        prop_assume!(names[file] != "manifest.json.minisig" || !(before as char).is_whitespace());
        fs::write(&path, &bytes).unwrap();
        prop_assert!(verify(&signed.dir, &signed.key).is_err(), "bit {bit} of byte {at} of {}", names[file]);
    }

    #[test]
    fn garbage_is_never_a_manifest(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(Manifest::from_json(&bytes).is_err());
    }
}
