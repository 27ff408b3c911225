//! A network being built: nodes in order, weights by reference, shapes checked as it grows.
//!
//! Every value carries its element type and axes, so that a mistake in a network's description is
//! found while the graph is built and not by the runtime that loads it. The activation type
//! ([`Graph::act`]) is fp32 or fp16; casts are explicit nodes and nothing depends on builder flags.

use std::collections::{BTreeSet, HashMap};

use bundle::{DType, Dim as SpecDim, Precision, TensorSpec};

use crate::checkpoint::TensorRef;
use crate::onnx::{AttributeProto, NodeProto, TensorProto, element};

mod model;
mod ops;
mod working;

pub use ops::Reduction;

/// Operator set of all graphs: LayerNormalization needs 17, `TensorRT` 10.3 reads up to 20.
const OPSET: i64 = 17;
const IR_VERSION: i64 = 8;
/// ONNX Runtime's own operators: the second dialect, used where it is measured to be faster.
const FUSED_DOMAIN: &str = "com.microsoft";

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elem {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// 8-bit signed integer: quantised weights.
    I8,
    /// 64-bit signed integer.
    I64,
    /// Truth value.
    Bool,
}

impl Elem {
    fn onnx(self) -> i32 {
        match self {
            Elem::F32 => element::FLOAT,
            Elem::F16 => element::FLOAT16,
            Elem::I8 => element::INT8,
            Elem::I64 => element::INT64,
            Elem::Bool => element::BOOL,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Elem::F32 => "fp32",
            Elem::F16 => "fp16",
            Elem::I64 => "int64",
            Elem::I8 => "int8",
            Elem::Bool => "bool",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        match self {
            Elem::F32 => 4,
            Elem::F16 => 2,
            Elem::I64 => 8,
            Elem::I8 | Elem::Bool => 1,
        }
    }
}

/// One axis of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// The batch times a constant.
    Batch(u64),
    /// A fixed length.
    Len(u64),
}

/// The batch axis.
pub const BATCH: Axis = Axis::Batch(1);

impl Axis {
    fn times(self, factor: u64) -> Axis {
        match self {
            Axis::Batch(times) => Axis::Batch(times * factor),
            Axis::Len(len) => Axis::Len(len * factor),
        }
    }
}

/// A value of the graph.
#[derive(Clone, Debug)]
pub struct Value {
    name: String,
    elem: Elem,
    shape: Vec<Axis>,
}

impl Value {
    /// Axes, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[Axis] {
        &self.shape
    }

    /// Element type.
    #[must_use]
    pub fn elem(&self) -> Elem {
        self.elem
    }

    /// Length of a fixed axis, counted from the front.
    ///
    /// # Panics
    /// Where the axis is missing or the batch: the network's description is wrong.
    #[must_use]
    pub fn len(&self, axis: usize) -> u64 {
        match self.shape.get(axis) {
            Some(Axis::Len(len)) => *len,
            other => panic!(
                "axis {axis} of {} is {other:?}, not a fixed length",
                self.name
            ),
        }
    }

    /// Length of the last axis.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.len(self.shape.len() - 1)
    }
}

/// How a checkpoint tensor lies in the bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As in the checkpoint.
    AsStored,
    /// A matrix with its axes exchanged.
    Transposed,
    /// Integers of at most 127 to be multiplied by a number per column: a matrix `[out, in]` as
    /// `[in, out]`, or as bands `[band, in, out of the band]`.
    Quantised,
    /// What the columns of the same matrix, quantised before, are multiplied by.
    Scales,
}

/// Where the numbers of a weight come from.
#[derive(Clone, Debug)]
pub enum Numbers<'c> {
    /// A checkpoint tensor.
    Tensor(TensorRef<'c>, Layout),
    /// Computed at export, row-major.
    Table(Vec<f32>),
    /// Nothing: the tensor is missing from the checkpoint, which was reported.
    Missing,
}

/// A weight of the graph, to be written to external data.
#[derive(Clone, Debug)]
pub struct Weight<'c> {
    /// Name of the initializer.
    pub name: String,
    /// Element type in the bundle.
    pub elem: Elem,
    /// Axes in the bundle.
    pub shape: Vec<u64>,
    /// Where the numbers come from.
    pub numbers: Numbers<'c>,
}

/// A network being built.
#[derive(Debug)]
pub struct Graph<'c> {
    name: String,
    act: Elem,
    quantised: bool,
    nodes: Vec<NodeProto>,
    /// Nodes named so far.
    named: usize,
    /// Bytes of each node's result at batch 1.
    node_bytes: Vec<u64>,
    inline: Vec<TensorProto>,
    weights: Vec<Weight<'c>>,
    by_name: HashMap<String, Value>,
    inputs: Vec<Value>,
    outputs: Vec<Value>,
}

impl<'c> Graph<'c> {
    /// An empty graph whose activations have the given precision.
    #[must_use]
    pub fn new(name: &str, precision: Precision) -> Graph<'c> {
        let act = match precision {
            Precision::Fp32 | Precision::Int8 => Elem::F32,
            Precision::Fp16 => Elem::F16,
        };
        Graph {
            name: name.into(),
            act,
            quantised: false,
            nodes: Vec::new(),
            named: 0,
            node_bytes: Vec::new(),
            inline: Vec::new(),
            weights: Vec::new(),
            by_name: HashMap::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// Element type of activations and of the weights that meet them.
    #[must_use]
    pub fn act(&self) -> Elem {
        self.act
    }

    /// Matrix products with weights are to be done in 8-bit integers where the precision says so.
    ///
    /// For networks that bear it; the others stay in fp32.
    pub fn quantise(&mut self, precision: Precision) {
        self.quantised = precision == Precision::Int8;
    }

    /// Whether matrix products with weights are done in 8-bit integers.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        self.quantised
    }

    /// Declares an fp32 graph input.
    pub fn input(&mut self, name: &str, shape: &[Axis]) -> Value {
        let value = Value {
            name: name.into(),
            elem: Elem::F32,
            shape: shape.into(),
        };
        self.inputs.push(value.clone());
        value
    }

    /// Declares a graph input of 64-bit integers.
    pub fn input_ints(&mut self, name: &str, shape: &[Axis]) -> Value {
        let value = Value {
            name: name.into(),
            elem: Elem::I64,
            shape: shape.into(),
        };
        self.inputs.push(value.clone());
        value
    }

    /// Declares a graph output; it is cast to fp32.
    pub fn output(&mut self, name: &str, value: &Value) {
        let wide = self.cast(value, Elem::F32);
        let node = NodeProto {
            input: vec![wide.name.clone()],
            output: vec![name.into()],
            name: format!("output_{name}"),
            op_type: "Identity".into(),
            ..NodeProto::default()
        };
        self.nodes.push(node);
        self.node_bytes.push(working::len_bytes(&wide));
        self.outputs.push(Value {
            name: name.into(),
            elem: Elem::F32,
            shape: wide.shape,
        });
    }

    /// Adds a weight; asking twice for the same name gives the same value.
    pub fn weight(&mut self, name: &str, elem: Elem, shape: &[u64], numbers: Numbers<'c>) -> Value {
        let name = format!("{name}:{}", elem.onnx());
        if let Some(value) = self.by_name.get(&name) {
            return value.clone();
        }
        let value = Value {
            name: name.clone(),
            elem,
            shape: shape.iter().map(|&len| Axis::Len(len)).collect(),
        };
        self.by_name.insert(name.clone(), value.clone());
        self.weights.push(Weight {
            name,
            elem,
            shape: shape.into(),
            numbers,
        });
        value
    }

    /// Adds a table computed at export, row-major.
    ///
    /// # Panics
    /// Where shape and number of values differ.
    pub fn table(&mut self, name: &str, elem: Elem, shape: &[u64], values: Vec<f32>) -> Value {
        assert_eq!(
            shape.iter().product::<u64>(),
            values.len() as u64,
            "table {name} has another size than its shape"
        );
        self.weight(name, elem, shape, Numbers::Table(values))
    }

    /// A number of the activation type or another float type.
    pub fn scalar(&mut self, value: f32, elem: Elem) -> Value {
        let bytes = match elem {
            Elem::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        self.constant(
            &format!("scalar_{value:e}_{}", elem.onnx()),
            elem,
            &[],
            bytes,
        )
    }

    fn ints(&mut self, values: &[i64]) -> Value {
        let text: Vec<String> = values.iter().map(i64::to_string).collect();
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.constant(
            &format!("ints_{}", text.join("_")),
            Elem::I64,
            &[values.len() as u64],
            bytes,
        )
    }

    fn floats(&mut self, name: &str, values: &[f32]) -> Value {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.constant(name, Elem::F32, &[values.len() as u64], bytes)
    }

    fn constant(&mut self, name: &str, elem: Elem, shape: &[u64], bytes: Vec<u8>) -> Value {
        if let Some(value) = self.by_name.get(name) {
            return value.clone();
        }
        let value = Value {
            name: name.into(),
            elem,
            shape: shape.iter().map(|&len| Axis::Len(len)).collect(),
        };
        self.inline.push(TensorProto {
            dims: shape.iter().map(|&len| signed(len)).collect(),
            data_type: elem.onnx(),
            name: name.into(),
            raw_data: Some(bytes),
            ..TensorProto::default()
        });
        self.by_name.insert(name.into(), value.clone());
        value
    }

    fn node(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        elem: Elem,
        shape: Vec<Axis>,
    ) -> Value {
        // Casts are not counted: a node has the same name in every precision.
        let name = format!("{op}_{}", self.named);
        self.named += 1;
        self.push(name, op, inputs, attributes, elem, shape)
    }

    fn push(
        &mut self,
        name: String,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        elem: Elem,
        shape: Vec<Axis>,
    ) -> Value {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|value| value.name.clone()).collect(),
            output: vec![name.clone()],
            name: format!("node_{name}"),
            op_type: op.into(),
            attribute: attributes,
            domain: String::new(),
        });
        let value = Value { name, elem, shape };
        self.node_bytes.push(working::len_bytes(&value));
        value
    }

    /// A node of ONNX Runtime's own operators.
    fn fused_node(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        elem: Elem,
        shape: Vec<Axis>,
    ) -> Value {
        let value = self.node(op, inputs, attributes, elem, shape);
        if let Some(node) = self.nodes.last_mut() {
            node.domain = FUSED_DOMAIN.into();
        }
        value
    }

    /// An input that was declared before.
    ///
    /// # Panics
    /// Where there is none of that name.
    #[must_use]
    pub fn declared(&self, name: &str) -> Value {
        let input = self.inputs.iter().find(|input| input.name == name);
        input
            .unwrap_or_else(|| panic!("no input {name} was declared"))
            .clone()
    }

    /// Inputs and outputs as the manifest lists them.
    #[must_use]
    pub fn specs(&self) -> (Vec<TensorSpec>, Vec<TensorSpec>) {
        let spec = |value: &Value| TensorSpec {
            name: value.name.clone(),
            dtype: match value.elem {
                Elem::I64 => DType::I64,
                _ => DType::F32,
            },
            shape: value
                .shape
                .iter()
                .map(|axis| match axis {
                    Axis::Batch(_) => SpecDim::BATCH,
                    Axis::Len(len) => SpecDim::Fixed(*len),
                })
                .collect(),
        };
        (
            self.inputs.iter().map(spec).collect(),
            self.outputs.iter().map(spec).collect(),
        )
    }

    /// Stores weights of these names in fp32, whatever meets them.
    pub fn keep_wide(&mut self, names: &BTreeSet<String>) {
        for weight in &mut self.weights {
            if names.contains(&weight.name) {
                weight.elem = Elem::F32;
            }
        }
    }

    /// Weights in the order they are written.
    #[must_use]
    pub fn weights(&self) -> &[Weight<'c>] {
        &self.weights
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).expect("lengths were checked against the checkpoint's size")
}
