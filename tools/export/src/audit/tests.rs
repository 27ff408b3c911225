//! Graphs of a few nodes through ONNX Runtime: rounding happens, islands help, probes see.

use std::collections::BTreeMap;
use std::path::Path;

use bundle::{Precision, Stage as StageSpec};
use decoder::{Runtime, Stage};
use ndarray::{ArrayD, IxDyn};
use prost::Message;

use super::range::{self, Magnitude};
use super::widen::{Rounding, widen};
use super::{Islands, emulated};
use crate::graph::{Axis, BATCH, Graph, Value};
use crate::onnx::{GraphProto, ModelProto};

fn runtime() -> Runtime {
    let library = decoder::runtime::find_library(None).expect("ONNX Runtime is fetched");
    Runtime::load(&library, 2).expect("ONNX Runtime starts")
}

fn open(graph: &Graph<'_>, model: &ModelProto, more: Vec<bundle::TensorSpec>) -> Stage {
    let (inputs, mut outputs) = graph.specs();
    outputs.extend(more);
    let spec = StageSpec {
        graph: "test".into(),
        weights: None,
        inputs,
        outputs,
        working_bytes: 0,
    };
    Stage::open_as_written(&runtime(), Path::new("."), &spec, &model.encode_to_vec()).unwrap()
}

fn call(stage: &Stage, input: &[f32]) -> BTreeMap<String, ArrayD<f32>> {
    let values = ArrayD::from_shape_vec(IxDyn(&[1, input.len()]), input.to_vec()).unwrap();
    stage.run_unchecked(&[("x", values.view())]).unwrap()
}

fn run(graph: &Graph<'_>, change: impl FnOnce(&mut GraphProto), input: &[f32]) -> Vec<f32> {
    let mut model = graph.model("", &[]);
    change(model.graph.as_mut().unwrap());
    let outputs = call(&open(graph, &model, Vec::new()), input);
    outputs["y"].iter().copied().collect()
}

fn written(
    len: u64,
    precision: Precision,
    build: impl FnOnce(&mut Graph<'_>, &Value) -> Value,
) -> Graph<'static> {
    let mut g = Graph::new("test", precision);
    let x = g.input("x", &[BATCH, Axis::Len(len)]);
    let act = g.act();
    let x = g.cast(&x, act);
    let y = build(&mut g, &x);
    g.output("y", &y);
    g
}

#[test]
fn rounding_is_effective() {
    let g = written(2, Precision::Fp16, |g, x| {
        let one = g.scalar(1.0, x.elem());
        let raised = g.add(x, &one);
        let minus = g.scalar(-1.0, x.elem());
        g.add(&raised, &minus)
    });
    // 2^-12 is an fp16 number of its own, but 1 + 2^-12 is none.
    let small = 2.0_f32.powi(-12);
    let with = |rounding| run(&g, |graph| widen(graph, rounding), &[small, 0.25]);
    assert_eq!(with(Rounding::None), [small, 0.25]);
    assert_eq!(with(Rounding::Half), [0.0, 0.25]);
}

#[test]
fn values_that_are_only_moved_are_rounded_once_and_correctly() {
    let g = written(4, Precision::Fp16, |g, x| {
        let part = g.slice(x, 1, 1, 3);
        g.concat(&[&part, &part], 1)
    });
    let fine = 1.0 + 2.0_f32.powi(-12);
    let found = run(
        &g,
        |graph| widen(graph, Rounding::Half),
        &[0.5, fine, 2.0, 3.0],
    );
    assert_eq!(found, [1.0, 2.0, 1.0, 2.0]);
}

/// 300 times 300 is more than fp16 holds; what follows divides it away again.
fn overflowing() -> Graph<'static> {
    written(2, Precision::Fp16, |g, x| {
        let large = g.scale(x, 300.0);
        let larger = g.scale(&large, 300.0);
        let moved = g.transpose(&larger, &[0, 1]);
        let back = g.scale(&moved, 1.0 / 256.0);
        g.scale(&back, 1.0 / 256.0)
    })
}

#[test]
fn an_island_holds_what_fp16_cannot_and_nothing_beside_it_changes() {
    let g = overflowing();
    let rounded = |islands: &Islands| {
        let change = |graph: &mut GraphProto| {
            islands.apply(graph);
            widen(graph, Rounding::Half);
        };
        run(&g, change, &[1.0, 2.0])
    };
    assert!(rounded(&Islands::default())[0].is_infinite());
    // All three that touch the large value; their names are the nodes' own.
    let values = ["Mul_1", "Transpose_2", "Mul_3"].map(String::from).into();
    let islands = Islands {
        values,
        ..Islands::default()
    };
    let expected = 300.0 * 300.0 / 65536.0;
    let found = rounded(&islands);
    assert!((found[0] / expected - 1.0).abs() < 1e-3, "{found:?}");

    // Between the island's nodes there is no cast, and what ONNX Runtime reads is well typed.
    let mut model = g.model("", &[]);
    islands.apply(model.graph.as_mut().unwrap());
    let graph = model.graph.as_ref().unwrap();
    let casts = graph
        .node
        .iter()
        .filter(|node| node.op_type == "Cast")
        .count();
    // The input, one scale and one value into the island for each end of it, the output.
    let scalars = 2;
    assert_eq!(casts, 1 + 1 + scalars + 1 + 1, "{graph:?}");
    let found = call(&open(&g, &model, Vec::new()), &[1.0, 2.0]);
    assert!(
        (found["y"][[0, 0]] / expected - 1.0).abs() < 1e-3,
        "{found:?}"
    );
}

#[test]
fn a_graph_is_the_same_after_reading_and_writing_and_foreign_fields_are_refused() {
    let bytes = overflowing().model("", &[]).encode_to_vec();
    assert!(emulated(&bytes).is_ok());
    // Field 3 of a model, `producer_version`, which the exporter never writes.
    let foreign = [bytes.as_slice(), &[0x1a, 1, b'1']].concat();
    assert!(emulated(&foreign).is_err());
}

fn magnitudes(g: &Graph<'_>, limit: u64, input: &[f32]) -> Vec<Magnitude> {
    let model = g.model("", &[]);
    let values = range::measured(model.graph.as_ref().unwrap());
    let passes = range::passes(values, &g.value_bytes(), limit);
    let look = |values| {
        let mut model = model.clone();
        let probed = range::probe(model.graph.as_mut().unwrap(), values);
        let stage = open(g, &model, probed.specs());
        probed.take(&mut call(&stage, input))
    };
    passes.into_iter().flat_map(look).collect()
}

#[test]
fn the_largest_magnitude_of_every_value_is_found() {
    let g = written(3, Precision::Fp32, |g, x| {
        let tripled = g.scale(x, 3.0);
        let root = g.scalar(0.0, x.elem());
        let divided = g.div(&tripled, &root);
        let none = g.scalar(0.0, x.elem());
        g.mul(&divided, &none)
    });
    // All values in one run, and each in one of its own.
    for limit in [u64::MAX, 0] {
        let found = magnitudes(&g, limit, &[1.0, -5.0, 2.0]);
        assert_eq!(found.len(), 3);
        let of = |name: &str| found.iter().find(|m| m.value == name).unwrap();
        assert_eq!((of("Mul_0").largest, of("Mul_0").sum), (15.0, -6.0));
        assert_eq!(of("Div_1").largest, f32::INFINITY);
        assert!(of("Mul_2").sum.is_nan());
    }
}

#[test]
fn probing_takes_no_more_memory_than_it_may() {
    // Eighty values of 16 MiB each; kept to the end they would be 1.3 GiB.
    const LEN: u64 = 4 << 20;
    let g = written(LEN, Precision::Fp32, |g, x| {
        let mut y = x.clone();
        for _ in 0..40 {
            y = g.sin(&y);
            y = g.add(&y, x);
        }
        g.slice(&y, 1, 0, 4)
    });
    let watch = super::memory::Watch::start();
    let input = vec![0.5; usize::try_from(LEN).unwrap()];
    assert!(
        magnitudes(&g, 128 << 20, &input)
            .iter()
            .all(|m| m.largest < 2.0)
    );
    let resident = watch.stop();
    let grown = resident.peak_bytes - resident.before_bytes;
    assert!(grown < 400 << 20, "{grown} bytes");
}
