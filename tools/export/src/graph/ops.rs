//! Operators: each checks its operands' axes and says what the result's are.

use super::{Axis, Elem, Graph, Value, signed};
use crate::onnx::AttributeProto;

impl Graph<'_> {
    fn unary(&mut self, op: &str, x: &Value) -> Value {
        self.node(op, &[x], Vec::new(), x.elem, x.shape.clone())
    }

    fn binary(&mut self, op: &str, a: &Value, b: &Value) -> Value {
        assert_eq!(a.elem, b.elem, "{op} of {a:?} and {b:?}");
        let shape = broadcast(&a.shape, &b.shape);
        self.node(op, &[a, b], Vec::new(), a.elem, shape)
    }

    /// `x` in another element type.
    pub fn cast(&mut self, x: &Value, elem: Elem) -> Value {
        if x.elem == elem {
            return x.clone();
        }
        let name = format!("{}_as_{}", x.name, elem.word());
        if let Some(value) = self.by_name.get(&name) {
            return value.clone();
        }
        let to = vec![AttributeProto::int("to", i64::from(elem.onnx()))];
        let value = self.push(name.clone(), "Cast", &[x], to, elem, x.shape.clone());
        self.by_name.insert(name, value.clone());
        value
    }

    /// Element-wise sum.
    pub fn add(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Add", a, b)
    }

    /// Element-wise product.
    pub fn mul(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Mul", a, b)
    }

    /// Element-wise quotient.
    pub fn div(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Div", a, b)
    }

    /// Element-wise maximum.
    pub fn max(&mut self, a: &Value, b: &Value) -> Value {
        self.binary("Max", a, b)
    }

    /// `x` times a constant.
    pub fn scale(&mut self, x: &Value, factor: f32) -> Value {
        let factor = self.scalar(factor, x.elem);
        self.mul(x, &factor)
    }

    /// `a` where `a > b`, as truth values.
    pub fn greater(&mut self, a: &Value, b: &Value) -> Value {
        let mut value = self.binary("Greater", a, b);
        value.elem = Elem::Bool;
        value
    }

    /// `yes` where the condition holds, else `no`.
    pub fn choose(&mut self, condition: &Value, yes: &Value, no: &Value) -> Value {
        let shape = broadcast(&broadcast(&condition.shape, &yes.shape), &no.shape);
        self.node("Where", &[condition, yes, no], Vec::new(), yes.elem, shape)
    }

    /// Sigmoid.
    pub fn sigmoid(&mut self, x: &Value) -> Value {
        self.unary("Sigmoid", x)
    }

    /// Hyperbolic tangent.
    pub fn tanh(&mut self, x: &Value) -> Value {
        self.unary("Tanh", x)
    }

    /// What is above zero.
    pub fn relu(&mut self, x: &Value) -> Value {
        self.unary("Relu", x)
    }

    /// Gauss error function.
    pub fn erf(&mut self, x: &Value) -> Value {
        self.unary("Erf", x)
    }

    /// Sine.
    pub fn sin(&mut self, x: &Value) -> Value {
        self.unary("Sin", x)
    }

    /// Cosine.
    pub fn cos(&mut self, x: &Value) -> Value {
        self.unary("Cos", x)
    }

    /// Softmax over the last axis.
    pub fn softmax(&mut self, x: &Value) -> Value {
        self.node(
            "Softmax",
            &[x],
            vec![AttributeProto::int("axis", -1)],
            x.elem,
            x.shape.clone(),
        )
    }

    /// A reduction over the last axis, which becomes 1.
    pub fn reduce_last(&mut self, op: Reduction, x: &Value) -> Value {
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = Axis::Len(1);
        }
        let attributes = vec![
            AttributeProto::ints("axes", &[-1]),
            AttributeProto::int("keepdims", 1),
        ];
        self.node(op.onnx(), &[x], attributes, x.elem, shape)
    }

    /// Matrix product over the last two axes; leading axes broadcast.
    ///
    /// # Panics
    /// Where the inner axes differ.
    pub fn matmul(&mut self, a: &Value, b: &Value) -> Value {
        assert_eq!(a.elem, b.elem, "MatMul of {a:?} and {b:?}");
        let (rows, inner) = (a.shape[a.shape.len() - 2], a.last());
        assert_eq!(inner, b.len(b.shape.len() - 2), "MatMul of {a:?} and {b:?}");
        let mut shape = broadcast(&a.shape[..a.shape.len() - 2], &b.shape[..b.shape.len() - 2]);
        shape.extend([rows, Axis::Len(b.last())]);
        self.node("MatMul", &[a, b], Vec::new(), a.elem, shape)
    }

    /// `x` `[.., row, in]`, rounded to 8-bit integers with a scale of its own at each call, times
    /// `weight` `[in, out]` or bands of it `[band, in, out]`, 8-bit integers that `scales` (`[out]`,
    /// `[band, 1, out]`) belong to; plus `bias` `[out]`.
    ///
    /// # Panics
    /// Where the inner axes differ or the weight is not of integers.
    pub fn matmul_dynamic(
        &mut self,
        x: &Value,
        weight: &Value,
        scales: &Value,
        bias: Option<&Value>,
    ) -> Value {
        assert_eq!(
            weight.elem,
            Elem::I8,
            "DynamicQuantizeMatMul with {weight:?}"
        );
        let (rank, columns) = (weight.shape.len(), weight.last());
        assert_eq!(
            x.last(),
            weight.len(rank - 2),
            "product of {x:?} and {weight:?}"
        );
        let rows = x.shape[x.shape.len() - 2];
        let mut shape = broadcast(&x.shape[..x.shape.len() - 2], &weight.shape[..rank - 2]);
        shape.extend([rows, Axis::Len(columns)]);
        let none = Value {
            name: String::new(),
            elem: Elem::I8,
            shape: Vec::new(),
        };
        let mut inputs = vec![x, weight, scales];
        if let Some(bias) = bias {
            inputs.extend([&none, bias]);
        }
        self.fused_node("DynamicQuantizeMatMul", &inputs, Vec::new(), x.elem, shape)
    }

    /// `x` `[batch, in]` times the transpose of `weight` `[out, in]`, plus `bias` `[out]`.
    ///
    /// # Panics
    /// Where the inner axes differ.
    pub fn gemm(&mut self, x: &Value, weight: &Value, bias: Option<&Value>) -> Value {
        assert_eq!(x.last(), weight.len(1), "Gemm of {x:?} and {weight:?}");
        let shape = vec![x.shape[0], Axis::Len(weight.len(0))];
        let mut inputs = vec![x, weight];
        inputs.extend(bias);
        self.node(
            "Gemm",
            &inputs,
            vec![AttributeProto::int("transB", 1)],
            x.elem,
            shape,
        )
    }

    /// Convolution of `x` `[batch, in, height, width]` with `weight` `[out, in, k, k]`, `bias` `[out]`;
    /// padded by half the kernel on every side.
    pub fn conv(&mut self, x: &Value, weight: &Value, bias: &Value, stride: u64) -> Value {
        self.padded_conv(x, weight, Some(bias), stride)
    }

    /// As [`Self::conv`] with stride 1, without bias.
    pub fn conv_without_bias(&mut self, x: &Value, weight: &Value) -> Value {
        self.padded_conv(x, weight, None, 1)
    }

    fn padded_conv(
        &mut self,
        x: &Value,
        weight: &Value,
        bias: Option<&Value>,
        stride: u64,
    ) -> Value {
        assert_eq!(x.len(1), weight.len(1), "Conv of {x:?} and {weight:?}");
        let (kernel_h, kernel_w) = (weight.len(2), weight.len(3));
        let (pad_h, pad_w) = (kernel_h / 2, kernel_w / 2);
        let out =
            |len: u64, kernel: u64, pad: u64| Axis::Len((len + 2 * pad - kernel) / stride + 1);
        let shape = vec![
            x.shape[0],
            Axis::Len(weight.len(0)),
            out(x.len(2), kernel_h, pad_h),
            out(x.len(3), kernel_w, pad_w),
        ];
        let pads = [pad_h, pad_w, pad_h, pad_w].map(signed);
        let attributes = vec![
            AttributeProto::ints("kernel_shape", &[kernel_h, kernel_w].map(signed)),
            AttributeProto::ints("pads", &pads),
            AttributeProto::ints("strides", &[signed(stride), signed(stride)]),
        ];
        let mut inputs = vec![x, weight];
        inputs.extend(bias);
        self.node("Conv", &inputs, attributes, x.elem, shape)
    }

    /// Convolution that halves `x` and pads one row below and one column to the right, as the
    /// encoders of latent autoencoders do.
    pub fn conv_halving(&mut self, x: &Value, weight: &Value, bias: &Value) -> Value {
        assert_eq!(x.len(1), weight.len(1), "Conv of {x:?} and {weight:?}");
        let (kernel_h, kernel_w) = (weight.len(2), weight.len(3));
        let out = |len: u64, kernel: u64| Axis::Len((len + 1).saturating_sub(kernel) / 2 + 1);
        let shape = vec![
            x.shape[0],
            Axis::Len(weight.len(0)),
            out(x.len(2), kernel_h),
            out(x.len(3), kernel_w),
        ];
        let attributes = vec![
            AttributeProto::ints("kernel_shape", &[kernel_h, kernel_w].map(signed)),
            AttributeProto::ints("pads", &[0, 0, 1, 1]),
            AttributeProto::ints("strides", &[2, 2]),
        ];
        self.node("Conv", &[x, weight, bias], attributes, x.elem, shape)
    }

    /// Convolution without bias whose windows do not overlap: patches to vectors.
    pub fn patches(&mut self, x: &Value, weight: &Value) -> Value {
        assert_eq!(x.len(1), weight.len(1), "Conv of {x:?} and {weight:?}");
        let (kernel_h, kernel_w) = (weight.len(2), weight.len(3));
        let shape = vec![
            x.shape[0],
            Axis::Len(weight.len(0)),
            Axis::Len(x.len(2) / kernel_h),
            Axis::Len(x.len(3) / kernel_w),
        ];
        let kernel = [kernel_h, kernel_w].map(signed);
        let attributes = vec![
            AttributeProto::ints("kernel_shape", &kernel),
            AttributeProto::ints("strides", &kernel),
        ];
        self.node("Conv", &[x, weight], attributes, x.elem, shape)
    }

    /// Twice the height and width of `x` `[batch, channel, height, width]`, nearest neighbour.
    pub fn upsample(&mut self, x: &Value) -> Value {
        let none = Value {
            name: String::new(),
            elem: Elem::F32,
            shape: Vec::new(),
        };
        let scales = self.floats("upsample_scales", &[1.0, 1.0, 2.0, 2.0]);
        let shape = vec![
            x.shape[0],
            x.shape[1],
            x.shape[2].times(2),
            x.shape[3].times(2),
        ];
        let attributes = vec![
            AttributeProto::text("coordinate_transformation_mode", "asymmetric"),
            AttributeProto::text("mode", "nearest"),
            AttributeProto::text("nearest_mode", "floor"),
        ];
        self.node("Resize", &[x, &none, &scales], attributes, x.elem, shape)
    }

    /// Normalises each row of `x` `[batch, group, value]` to mean 0 and variance 1.
    pub fn instance_norm(&mut self, x: &Value, eps: f32) -> Value {
        let groups = x.len(1);
        let count = usize::try_from(groups).expect("group counts fit memory");
        let ones = self.floats(&format!("ones_{groups}"), &vec![1.0; count]);
        let zeros = self.floats(&format!("zeros_{groups}"), &vec![0.0; count]);
        self.node(
            "InstanceNormalization",
            &[x, &ones, &zeros],
            vec![AttributeProto::float("epsilon", eps)],
            x.elem,
            x.shape.clone(),
        )
    }

    /// Normalises the last axis, then times `gain`, plus `bias`, each `[last]`.
    pub fn layer_norm(&mut self, x: &Value, gain: &Value, bias: Option<&Value>, eps: f32) -> Value {
        let mut inputs = vec![x, gain];
        inputs.extend(bias);
        let attributes = vec![
            AttributeProto::int("axis", -1),
            AttributeProto::float("epsilon", eps),
        ];
        self.node(
            "LayerNormalization",
            &inputs,
            attributes,
            x.elem,
            x.shape.clone(),
        )
    }

    /// Other axes for the same elements.
    ///
    /// # Panics
    /// Where the number of elements differs.
    pub fn reshape(&mut self, x: &Value, shape: &[Axis]) -> Value {
        assert_eq!(
            elements(&x.shape),
            elements(shape),
            "Reshape of {x:?} to {shape:?}"
        );
        if x.shape == shape {
            return x.clone();
        }
        let lens: Vec<i64> = shape
            .iter()
            .map(|axis| match axis {
                Axis::Batch(_) => -1,
                Axis::Len(len) => signed(*len),
            })
            .collect();
        let lens = self.ints(&lens);
        self.node("Reshape", &[x, &lens], Vec::new(), x.elem, shape.into())
    }

    /// Axes in another order.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Value {
        let shape = order.iter().map(|&axis| x.shape[axis]).collect();
        let perm: Vec<i64> = order.iter().map(|&axis| signed(axis as u64)).collect();
        self.node(
            "Transpose",
            &[x],
            vec![AttributeProto::ints("perm", &perm)],
            x.elem,
            shape,
        )
    }

    /// Values joined along one axis.
    pub fn concat(&mut self, values: &[&Value], axis: usize) -> Value {
        let mut shape = values[0].shape.clone();
        shape[axis] = Axis::Len(values.iter().map(|value| value.len(axis)).sum());
        self.node(
            "Concat",
            values,
            vec![AttributeProto::int("axis", signed(axis as u64))],
            values[0].elem,
            shape,
        )
    }

    /// Rows of `table` `[row, width]` by `indices` `[batch, n]`: `[batch, n, width]`.
    pub fn rows(&mut self, table: &Value, indices: &Value) -> Value {
        let shape = vec![indices.shape[0], indices.shape[1], table.shape[1]];
        let attributes = vec![AttributeProto::int("axis", 0)];
        self.node("Gather", &[table, indices], attributes, table.elem, shape)
    }

    /// Where the largest of each row of `x` `[batch, n]` is, the first of equals: a row of zeros
    /// with a one there, `[batch, 1, n]`, of the activation type.
    pub fn first_largest(&mut self, x: &Value) -> Value {
        // TensorRT's ArgMax takes floats; token ids are exact in single precision.
        let wide = self.cast(x, Elem::F32);
        let attributes = vec![
            AttributeProto::int("axis", 1),
            AttributeProto::int("keepdims", 1),
            AttributeProto::int("select_last_index", 0),
        ];
        let one = vec![x.shape[0], Axis::Len(1)];
        let place = self.node("ArgMax", &[&wide], attributes, Elem::I64, one);
        let places: Vec<i64> = (0..signed(x.len(1))).collect();
        let places = self.ints(&places);
        let shape = vec![x.shape[0], x.shape[1]];
        let equal = self.node("Equal", &[&place, &places], Vec::new(), Elem::Bool, shape);
        let act = self.act;
        let mask = self.cast(&equal, act);
        let shape = [x.shape[0], Axis::Len(1), x.shape[1]];
        self.reshape(&mask, &shape)
    }

    /// `x` between two numbers.
    pub fn clip(&mut self, x: &Value, low: f32, high: f32) -> Value {
        let (low, high) = (self.scalar(low, x.elem), self.scalar(high, x.elem));
        self.node(
            "Clip",
            &[x, &low, &high],
            Vec::new(),
            x.elem,
            x.shape.clone(),
        )
    }

    /// Elements `start..end` of one axis.
    pub fn slice(&mut self, x: &Value, axis: usize, start: u64, end: u64) -> Value {
        let mut shape = x.shape.clone();
        shape[axis] = Axis::Len(end - start);
        let bounds =
            [[signed(start)], [signed(end)], [signed(axis as u64)]].map(|value| self.ints(&value));
        self.node(
            "Slice",
            &[x, &bounds[0], &bounds[1], &bounds[2]],
            Vec::new(),
            x.elem,
            shape,
        )
    }

    /// `x` `[batch, row, column]` with one row of zeros in front.
    pub fn pad_front_row(&mut self, x: &Value) -> Value {
        let pads = self.ints(&[0, 1, 0, 0, 0, 0]);
        let shape = vec![x.shape[0], Axis::Len(x.len(1) + 1), x.shape[2]];
        self.node("Pad", &[x, &pads], Vec::new(), x.elem, shape)
    }

    /// `x` `[row, column]` with rows of zeros behind it.
    pub fn pad_rows_after(&mut self, x: &Value, rows: u64) -> Value {
        let pads = self.ints(&[0, 0, signed(rows), 0]);
        let shape = vec![Axis::Len(x.len(0) + rows), x.shape[1]];
        self.node("Pad", &[x, &pads], Vec::new(), x.elem, shape)
    }
}

/// What is left of the last axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Euclidean norm.
    L2,
    /// Largest value.
    Max,
}

impl Reduction {
    fn onnx(self) -> &'static str {
        match self {
            Reduction::L2 => "ReduceL2",
            Reduction::Max => "ReduceMax",
        }
    }
}
/// Elements as (constant, whether times the batch).
fn elements(shape: &[Axis]) -> (u64, u32) {
    shape
        .iter()
        .fold((1, 0), |(product, batches), axis| match axis {
            Axis::Batch(times) => (product * times, batches + 1),
            Axis::Len(len) => (product * len, batches),
        })
}

fn broadcast(a: &[Axis], b: &[Axis]) -> Vec<Axis> {
    let rank = a.len().max(b.len());
    let at = |shape: &[Axis], position: usize| {
        (position + shape.len())
            .checked_sub(rank)
            .map_or(Axis::Len(1), |index| shape[index])
    };
    (0..rank)
        .map(|position| match (at(a, position), at(b, position)) {
            (Axis::Len(1), other) | (other, Axis::Len(1)) => other,
            (one, two) => {
                assert_eq!(one, two, "{a:?} and {b:?} do not broadcast");
                one
            }
        })
        .collect()
}
