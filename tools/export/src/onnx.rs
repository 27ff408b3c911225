//! The part of the ONNX protobuf format that the exporter writes.
//!
//! Field numbers are those of `onnx.proto` (ONNX IR version 8); messages hold only the fields used here.

/// A whole model.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ModelProto {
    /// Version of the format, 8.
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    /// `afterimage-export`.
    #[prost(string, tag = "2")]
    pub producer_name: String,
    /// The network.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets the graph needs.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
}

/// An operator set and its version.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OperatorSetIdProto {
    /// Empty for the standard operators.
    #[prost(string, tag = "1")]
    pub domain: String,
    /// Version of the set.
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// A network.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GraphProto {
    /// Operations in the order they run.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the stage.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Constants and weights.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// Inputs.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// Outputs.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

/// One operation.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeProto {
    /// Names of the values read.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the values made.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Operator.
    #[prost(string, tag = "4")]
    pub op_type: String,
    /// Settings of the operator.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Set of the operator; empty for the standard ones.
    #[prost(string, tag = "7")]
    pub domain: String,
}

/// A setting of an operator.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AttributeProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value where `type` is [`AttributeProto::FLOAT`].
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// Value where `type` is [`AttributeProto::INT`].
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// Value where `type` is [`AttributeProto::STRING`].
    #[prost(bytes = "vec", optional, tag = "4")]
    pub s: Option<Vec<u8>>,
    /// Value where `type` is [`AttributeProto::INTS`].
    #[prost(int64, repeated, tag = "8")]
    pub ints: Vec<i64>,
    /// Which of the values holds.
    #[prost(int32, tag = "20")]
    pub r#type: i32,
}

impl AttributeProto {
    /// Type of [`Self::f`].
    pub const FLOAT: i32 = 1;
    /// Type of [`Self::i`].
    pub const INT: i32 = 2;
    /// Type of [`Self::s`].
    pub const STRING: i32 = 3;
    /// Type of [`Self::ints`].
    pub const INTS: i32 = 7;

    /// A float setting.
    #[must_use]
    pub fn float(name: &str, value: f32) -> Self {
        Self {
            name: name.into(),
            f: Some(value),
            r#type: Self::FLOAT,
            ..Self::default()
        }
    }

    /// An integer setting.
    #[must_use]
    pub fn int(name: &str, value: i64) -> Self {
        Self {
            name: name.into(),
            i: Some(value),
            r#type: Self::INT,
            ..Self::default()
        }
    }

    /// A text setting.
    #[must_use]
    pub fn text(name: &str, value: &str) -> Self {
        Self {
            name: name.into(),
            s: Some(value.into()),
            r#type: Self::STRING,
            ..Self::default()
        }
    }

    /// A list of integers.
    #[must_use]
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self {
            name: name.into(),
            ints: values.into(),
            r#type: Self::INTS,
            ..Self::default()
        }
    }
}

/// A constant, inline or in an external file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorProto {
    /// Axes.
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    /// Element type, see [`element`].
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    /// Name.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Little-endian elements of an inline tensor.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub raw_data: Option<Vec<u8>>,
    /// `location`, `offset` and `length` of an external one.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// 1 where the data is external.
    #[prost(int32, optional, tag = "14")]
    pub data_location: Option<i32>,
}

/// A key and its value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StringStringEntryProto {
    /// Key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Name and type of a graph input or output.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ValueInfoProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

/// A tensor type.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TypeProto {
    /// Element type and axes.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

/// Element type and axes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorTypeProto {
    /// Element type, see [`element`].
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    /// Axes.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

/// Axes of a tensor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorShapeProto {
    /// Outermost first.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// One axis: a length or a name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DimensionProto {
    /// Length of a fixed axis.
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    /// Name of a free axis.
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}

/// Element types of `TensorProto.DataType`.
pub mod element {
    /// IEEE single precision.
    pub const FLOAT: i32 = 1;
    /// 8-bit signed integer.
    pub const INT8: i32 = 3;
    /// 64-bit signed integer.
    pub const INT64: i32 = 7;
    /// Truth value.
    pub const BOOL: i32 = 9;
    /// IEEE half precision.
    pub const FLOAT16: i32 = 10;
}
