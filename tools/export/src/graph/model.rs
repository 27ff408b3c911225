//! The finished network as ONNX protobuf, its weights external.

use super::{Axis, FUSED_DOMAIN, Graph, IR_VERSION, OPSET, Value, signed};
use crate::onnx::{
    DimensionProto, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};

impl Graph<'_> {
    /// The model's protobuf, once each weight's offset in the external file is known.
    ///
    /// `location` is relative to the bundle's root; `offsets` follow [`Self::weights`].
    #[must_use]
    pub fn model(&self, location: &str, offsets: &[u64]) -> ModelProto {
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: key.into(),
            value,
        };
        let external = self
            .weights
            .iter()
            .zip(offsets)
            .map(|(weight, offset)| TensorProto {
                dims: weight.shape.iter().map(|&len| signed(len)).collect(),
                data_type: weight.elem.onnx(),
                name: weight.name.clone(),
                raw_data: None,
                external_data: vec![
                    entry("location", location.into()),
                    entry("offset", offset.to_string()),
                    entry(
                        "length",
                        (weight.shape.iter().product::<u64>() * weight.elem.len_bytes())
                            .to_string(),
                    ),
                ],
                data_location: Some(1),
            });
        let initializer = self.inline.iter().cloned().chain(external).collect();
        ModelProto {
            ir_version: IR_VERSION,
            producer_name: "afterimage-export".into(),
            graph: Some(GraphProto {
                node: self.nodes.clone(),
                name: self.name.clone(),
                initializer,
                input: self.inputs.iter().map(value_info).collect(),
                output: self.outputs.iter().map(value_info).collect(),
            }),
            opset_import: self.operator_sets(),
        }
    }
}

impl Graph<'_> {
    fn operator_sets(&self) -> Vec<OperatorSetIdProto> {
        let set = |domain: &str, version| OperatorSetIdProto {
            domain: domain.into(),
            version,
        };
        let fused = self.nodes.iter().any(|node| node.domain == FUSED_DOMAIN);
        let fused = fused.then(|| set(FUSED_DOMAIN, 1));
        [set("", OPSET)].into_iter().chain(fused).collect()
    }
}

fn value_info(value: &Value) -> ValueInfoProto {
    let dim = value
        .shape
        .iter()
        .map(|axis| match axis {
            Axis::Batch(_) => DimensionProto {
                dim_value: None,
                dim_param: Some("batch".into()),
            },
            Axis::Len(len) => DimensionProto {
                dim_value: Some(signed(*len)),
                dim_param: None,
            },
        })
        .collect();
    let tensor = TensorTypeProto {
        elem_type: value.elem.onnx(),
        shape: Some(TensorShapeProto { dim }),
    };
    ValueInfoProto {
        name: value.name.clone(),
        r#type: Some(TypeProto {
            tensor_type: Some(tensor),
        }),
    }
}
