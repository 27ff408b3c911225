//! Folders of DeepSpeed's ZeRO: those that `torch` wrote against the original's result, and
//! damaged ones written here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use export::checkpoint::{Checkpoint, Container, TensorDType, inspect};
use export::export::export;

use crate::write::{Py, Saved, dict, global, size, text};
use crate::{bundle_files, golden, recipe, refused, root};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/zero")
}

#[test]
fn parameters_equal_those_of_the_original_script() {
    for (folder, expected) in [
        ("stage2", "stage2.safetensors"),
        ("stage2/global_step3", "stage2.safetensors"),
        ("stage1/last", "stage1.safetensors"),
    ] {
        let checkpoint = Checkpoint::open(&data().join(folder)).unwrap();
        assert_eq!(checkpoint.container(), Container::Zero);
        let reference = Checkpoint::open(&data().join(expected)).unwrap();
        assert_eq!(root(&checkpoint), root(&reference), "{folder}");
        let shapes = |checkpoint: &Checkpoint| -> BTreeMap<String, Vec<u64>> {
            let tensors = checkpoint.root().into_iter();
            tensors
                .map(|(name, tensor)| (name, tensor.shape().to_vec()))
                .collect()
        };
        assert_eq!(shapes(&checkpoint), shapes(&reference), "{folder}");
        let shown = inspect::render(&checkpoint);
        assert!(
            shown.starts_with("DeepSpeed ZeRO container\nfile: "),
            "{shown}"
        );
    }
}

/// Items of a dictionary.
type Items = Vec<(&'static str, Py)>;

/// A folder of two ranks and two groups, to be damaged before it is written.
struct Folder {
    model: Items,
    tensors: Saved,
    ranks: Vec<(String, Items, Saved)>,
}

/// What the folder's parameters are: `w` `[2, 3]` counts from 0, `b` `[3]` from 10, `s` scalar is 20.
fn folder() -> Folder {
    let mut tensors = Saved {
        value: Py::None,
        storages: Vec::new(),
    };
    let buffer = tensors.tensor(TensorDType::I64, &[1], &[5.0]);
    let half = tensors.tensor(TensorDType::F16, &[2, 3], &[0.0; 6]);
    let frozen = tensors.tensor(TensorDType::F16, &[2], &[8.0, 9.0]);
    let model = vec![
        ("module", dict([("w", half), ("count", buffer)])),
        ("buffer_names", Py::List(vec![text("count")])),
        (
            "param_shapes",
            Py::List(vec![
                dict([("w", size(&[2, 3])), ("b", size(&[3]))]),
                dict([("s", size(&[]))]),
            ]),
        ),
        ("frozen_param_shapes", dict([("f", size(&[2]))])),
        ("frozen_param_fragments", dict([("f", frozen)])),
        ("shared_params", dict([("again", text("b"))])),
    ];
    let first = [
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0, 0.0, 0.0, 0.0,
    ];
    let second = [20.0, 0.0, 0.0, 0.0];
    let ranks = (0..2)
        .map(|rank| {
            let mut saved = Saved {
                value: Py::None,
                storages: Vec::new(),
            };
            let groups = vec![
                saved.tensor(TensorDType::F32, &[6], &first[6 * rank..][..6]),
                saved.tensor(TensorDType::F32, &[2], &second[2 * rank..][..2]),
            ];
            let stage = global("deepspeed.runtime.zero.config", "ZeroStageEnum");
            let state = vec![
                ("zero_stage", Py::Call(Box::new(stage), vec![Py::Int(2)])),
                ("partition_count", Py::List(vec![Py::Int(2), Py::Int(2)])),
                ("single_partition_of_fp32_groups", Py::List(groups)),
            ];
            (
                format!("zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"),
                state,
                saved,
            )
        })
        .collect();
    Folder {
        model,
        tensors,
        ranks,
    }
}

fn pairs(items: Items) -> Py {
    Py::Dict(
        items
            .into_iter()
            .map(|(key, value)| (text(key), value))
            .collect(),
    )
}

impl Folder {
    fn set(&mut self, key: &'static str, value: Py) {
        self.model
            .iter_mut()
            .find(|(name, _)| *name == key)
            .unwrap()
            .1 = value;
    }

    fn set_rank(&mut self, rank: usize, key: &'static str, value: Py) {
        let state = &mut self.ranks[rank].1;
        state.iter_mut().find(|(name, _)| *name == key).unwrap().1 = value;
    }

    fn write(self, dir: &Path) {
        fs::create_dir(dir.join("global_step1")).unwrap();
        fs::write(dir.join("latest"), "global_step1\n").unwrap();
        let states = dir.join("global_step1");
        let model = Saved {
            value: pairs(self.model),
            ..self.tensors
        };
        fs::write(states.join("mp_rank_00_model_states.pt"), model.zip()).unwrap();
        for (name, state, saved) in self.ranks {
            let value = dict([("optimizer_state_dict", pairs(state))]);
            fs::write(states.join(name), Saved { value, ..saved }.legacy()).unwrap();
        }
    }

    fn refused(self) -> String {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        refused(dir.path())
    }
}

#[test]
fn a_parameter_that_lies_in_two_ranks_is_one_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = folder();
    // Cut elsewhere, as another number of ranks would: `w` begins in the first and ends in the second.
    for (_, state, saved) in &mut whole.ranks {
        let stored = std::mem::take(&mut saved.storages);
        drop(stored);
        state.retain(|(key, _)| *key != "single_partition_of_fp32_groups");
    }
    for (rank, numbers) in [
        (0, vec![0.0, 1.0, 2.0, 3.0]),
        (1, vec![4.0, 5.0, 10.0, 11.0, 12.0]),
    ] {
        let (_, state, saved) = &mut whole.ranks[rank];
        let len = i64::try_from(numbers.len()).unwrap();
        let first = saved.tensor(TensorDType::F32, &[len], &numbers);
        let second = match rank {
            0 => saved.tensor(TensorDType::F32, &[1], &[20.0]),
            _ => saved.tensor(TensorDType::F32, &[0], &[]),
        };
        state.push((
            "single_partition_of_fp32_groups",
            Py::List(vec![first, second]),
        ));
    }
    whole.write(dir.path());
    let read = root(&Checkpoint::open(dir.path()).unwrap());
    let expected: [(&str, &[f32]); 6] = [
        ("again", &[10.0, 11.0, 12.0]),
        ("b", &[10.0, 11.0, 12.0]),
        ("count", &[5.0]),
        ("f", &[8.0, 9.0]),
        ("s", &[20.0]),
        ("w", &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
    ];
    let expected: BTreeMap<String, Vec<f32>> = expected
        .iter()
        .map(|(name, values)| ((*name).into(), values.to_vec()))
        .collect();
    assert_eq!(read, expected);
}

#[test]
fn the_folder_of_the_other_tests_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    folder().write(dir.path());
    let read = root(&Checkpoint::open(dir.path()).unwrap());
    assert_eq!(read["w"], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(read["again"], [10.0, 11.0, 12.0]);
    assert_eq!(read["s"], [20.0]);
}

#[test]
fn stage_3_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    folder().write(dir.path());
    let states = dir.path().join("global_step1");
    fs::rename(
        states.join("mp_rank_00_model_states.pt"),
        states.join("zero_pp_rank_0_mp_rank_00_model_states.pt"),
    )
    .unwrap();
    let message = refused(dir.path());
    assert!(
        message.contains("expected ZeRO stage 1 or 2, found stage 3"),
        "{message}"
    );
    let mut stage = folder();
    stage.set_rank(1, "zero_stage", Py::Int(3));
    let message = stage.refused();
    assert!(
        message.contains("rank_1_mp_rank_00_optim_states.pt: zero_stage: expected 1 or 2, found 3"),
        "{message}"
    );
}

#[test]
fn stages_may_be_named_as_python_3_11_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut named = folder();
    let class = global("deepspeed.runtime.zero.config", "ZeroStageEnum");
    let getattr = Box::new(global("__builtin__", "getattr"));
    named.set_rank(
        0,
        "zero_stage",
        Py::Call(getattr, vec![class, text("gradients")]),
    );
    named.write(dir.path());
    assert_eq!(root(&Checkpoint::open(dir.path()).unwrap())["s"], [20.0]);
    let mut other = folder();
    let class = global("deepspeed.runtime.zero.config", "ZeroStageEnum");
    let getattr = Box::new(global("__builtin__", "getattr"));
    other.set_rank(0, "zero_stage", Py::Call(getattr, vec![class, text("mro")]));
    let message = other.refused();
    assert!(message.contains("expected a stage of ZeRO"), "{message}");
}

#[test]
fn all_that_is_wrong_with_the_model_states_is_in_one_report() {
    let mut wrong = folder();
    wrong.set("buffer_names", Py::None);
    wrong.set(
        "frozen_param_shapes",
        dict([("f", size(&[3])), ("g", size(&[1]))]),
    );
    wrong.set("shared_params", dict([("again", Py::Int(1))]));
    wrong.set(
        "param_shapes",
        Py::List(vec![
            dict([("w", size(&[2, 9])), ("b", text("x"))]),
            dict([("s", size(&[]))]),
        ]),
    );
    let message = wrong.refused();
    let file = "/global_step1/mp_rank_00_model_states.pt: ";
    for expected in [
        "buffer_names: expected a list of names, the key is missing",
        "frozen_param_fragments.f: expected shape [3], found [2]",
        "frozen_param_fragments.g: expected shape [1], the key is missing",
        "shared_params.again: expected the name of a parameter",
        "param_shapes.0.b: expected a shape",
        "param_shapes.0: expected 18 numbers and less than 4 of padding, found 12",
    ] {
        assert!(
            message.contains(&format!("{file}{expected}")),
            "{expected}\n{message}"
        );
    }
}

#[test]
fn all_that_is_wrong_with_the_ranks_is_in_one_report() {
    let mut wrong = folder();
    wrong.set_rank(0, "zero_stage", Py::None);
    wrong.set_rank(0, "partition_count", text("2"));
    let saved = &mut wrong.ranks[1].2;
    saved.storages.clear();
    let whole = saved.tensor(TensorDType::I64, &[6], &[0.0; 6]);
    let square = saved.tensor(TensorDType::F32, &[2, 1], &[0.0; 2]);
    wrong.set_rank(
        1,
        "single_partition_of_fp32_groups",
        Py::List(vec![whole, square, Py::Int(4)]),
    );
    let message = wrong.refused();
    for expected in [
        "zero_pp_rank_0_mp_rank_00_optim_states.pt: zero_stage: expected a number, found none",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt: partition_count: expected a number or a list",
        "rank_1_mp_rank_00_optim_states.pt: single_partition_of_fp32_groups.0: expected floating-point numbers, found int64",
        "rank_1_mp_rank_00_optim_states.pt: single_partition_of_fp32_groups.1: expected a flat run, found [2, 1]",
        "rank_1_mp_rank_00_optim_states.pt: single_partition_of_fp32_groups.2: expected a tensor",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
}

#[test]
fn a_missing_rank_or_one_of_another_run_is_refused() {
    let mut fewer = folder();
    fewer.ranks.pop();
    let message = fewer.refused();
    assert!(
        message.contains("partition_count: expected as many partitions as files, 1, found 2"),
        "{message}"
    );
    let mut gap = folder();
    gap.ranks[0].0 = "zero_pp_rank_2_mp_rank_00_optim_states.pt".into();
    let message = gap.refused();
    assert!(
        message
            .contains("rank 0: expected optimizer states as rank 1 has them, the file is missing"),
        "{message}"
    );
    let mut twice = folder();
    let mut again = folder().ranks.remove(0);
    again.0 = format!("bf16_{}", again.0);
    twice.ranks.push(again);
    let message = twice.refused();
    assert!(
        message.contains("rank 0: expected one file of optimizer states, found bf16_zero"),
        "{message}"
    );
    let mut expert = folder();
    expert.ranks[1].0 = "expp_rank_0_mp_rank_00_optim_states.pt".into();
    let message = expert.refused();
    assert!(
        message.contains("expp_rank_0_mp_rank_00_optim_states.pt: expected zero_pp_rank_N"),
        "{message}"
    );
    let mut groups = folder();
    groups.ranks[1].2.storages.clear();
    groups.set_rank(1, "single_partition_of_fp32_groups", Py::List(Vec::new()));
    let message = groups.refused();
    assert!(
        message.contains("single_partition_of_fp32_groups: expected 2 groups as"),
        "{message}"
    );
    let mut none = folder();
    none.ranks.clear();
    let message = none.refused();
    assert!(
        message.contains("expected optimizer states, the file is missing"),
        "{message}"
    );
}

#[test]
fn a_tag_that_leads_elsewhere_is_refused() {
    for tag in ["../elsewhere", "/etc", "", "..", ".", "a/b"] {
        let dir = tempfile::tempdir().unwrap();
        folder().write(dir.path());
        fs::write(dir.path().join("latest"), tag).unwrap();
        let message = refused(dir.path());
        assert!(
            message.contains("latest: expected the name of a folder beside it"),
            "{tag}: {message}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("latest"), "global_step9").unwrap();
    let message = refused(dir.path());
    assert!(
        message.contains("latest: expected a folder global_step9 beside it, it is missing"),
        "{message}"
    );
}

#[test]
fn a_class_outside_the_list_is_refused_and_never_called() {
    let mut evil = folder();
    let call = Py::Call(Box::new(global("os", "system")), vec![text("touch /tmp/x")]);
    evil.set_rank(0, "partition_count", call);
    let message = evil.refused();
    assert!(
        message.contains("os.system") && message.contains("nothing was executed"),
        "{message}"
    );
}

/// Name, shape and numbers of every tensor of a MindEye2 model.
fn model(golden: &Path) -> Vec<(String, Vec<i64>, Vec<f64>)> {
    let checkpoint = Checkpoint::open(&golden.join("hostile/control_ok.pth")).unwrap();
    let tensors = checkpoint.section("model_state_dict").unwrap();
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let shape = tensor
                .shape()
                .iter()
                .map(|&len| i64::try_from(len).unwrap());
            let values = tensor.read_f32().unwrap();
            (
                name,
                shape.collect(),
                values.into_iter().map(f64::from).collect(),
            )
        })
        .collect()
}

#[test]
fn a_zero_folder_and_a_bare_state_give_the_bundle_of_the_models_file() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tensors = model(&golden);
    // Parameters in three ranks, the noise schedule as buffers.
    let (mut buffers, mut flat, mut shapes) = (Vec::new(), Vec::new(), Vec::new());
    let mut states = Saved {
        value: Py::None,
        storages: Vec::new(),
    };
    for (name, shape, values) in &tensors {
        let key = text(&format!("module.{name}"));
        if name.contains("noise_scheduler") {
            buffers.push((key, states.tensor(TensorDType::F32, shape, values)));
        } else {
            shapes.push((key, size(shape)));
            flat.extend(values);
        }
    }
    flat.resize(flat.len().next_multiple_of(6), 0.0);
    let names = buffers.iter().map(|(name, _)| name.clone()).collect();
    states.value = dict([
        ("module", Py::Dict(buffers)),
        ("buffer_names", Py::List(names)),
        ("param_shapes", Py::List(vec![Py::Dict(shapes)])),
    ]);
    let last = dir.path().join("last");
    fs::create_dir(&last).unwrap();
    fs::write(last.join("mp_rank_00_model_states.pt"), states.zip()).unwrap();
    for (rank, part) in flat.chunks(flat.len() / 3).enumerate() {
        let mut saved = Saved {
            value: Py::None,
            storages: Vec::new(),
        };
        let len = i64::try_from(part.len()).unwrap();
        let part = saved.tensor(TensorDType::F32, &[len], part);
        let state = dict([
            ("zero_stage", Py::Int(2)),
            ("partition_count", Py::Int(3)),
            ("single_partition_of_fp32_groups", Py::List(vec![part])),
        ]);
        saved.value = dict([("optimizer_state_dict", state)]);
        let name = format!("zero_pp_rank_{rank}_mp_rank_00_optim_states.pt");
        fs::write(last.join(name), saved.zip()).unwrap();
    }
    let wrapped: Vec<(String, &[i64], &Vec<f64>)> = tensors
        .iter()
        .map(|(name, shape, values)| (format!("module.{name}"), shape.as_slice(), values))
        .collect();
    let bare: Vec<(&str, TensorDType, &[i64], Vec<f64>)> = wrapped
        .iter()
        .map(|(name, shape, values)| (name.as_str(), TensorDType::F64, *shape, (*values).clone()))
        .collect();
    fs::write(dir.path().join("bare.pth"), Saved::tensors(&bare).legacy()).unwrap();
    fs::write(
        dir.path().join("bare.safetensors"),
        crate::write::safetensors(&bare),
    )
    .unwrap();
    let control = golden.join("hostile/control_ok.pth");
    let export_of = |source: &Path, out: &str| {
        let text = format!("precision = \"fp16\"\n[sources]\nmindeye = {source:?}\n");
        let out = dir.path().join(out);
        export(&recipe(dir.path(), &text), &out, &mut |_| {}).unwrap();
        bundle_files(&out)
    };
    let expected = export_of(&control, "0");
    assert!(
        export_of(&last, "1") == expected,
        "the ZeRO folder's bundle differs"
    );
    assert!(
        export_of(&dir.path().join("bare.pth"), "2") == expected,
        "the bare state's bundle differs"
    );
    assert!(
        export_of(&dir.path().join("bare.safetensors"), "3") == expected,
        "the safetensors' bundle differs"
    );
    // Under its usual name it is found in a folder, and a rank that is lost is named.
    let plan = export::plan::Plan::from_folder(dir.path(), bundle::Precision::Fp32, false).unwrap();
    assert_eq!(plan.mindeye.as_deref(), Some(last.as_path()));
    fs::remove_file(last.join("zero_pp_rank_1_mp_rank_00_optim_states.pt")).unwrap();
    let out = dir.path().join("4");
    let error = export(&plan, &out, &mut |_| {}).unwrap_err();
    let message = export::section::chain(&error);
    assert!(
        message.contains("rank 1: expected optimizer states as rank 2 has them"),
        "{message}"
    );
    assert!(!out.exists());
}
