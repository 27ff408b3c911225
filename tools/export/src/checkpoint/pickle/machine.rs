//! The stack machine.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Global, Id, MAX_VALUES, PickleError, StorageRef, TensorValue, Value};

/// Runs one pickle from the front of `bytes`: its result, where it ended, and its values.
pub(super) fn run(bytes: &[u8]) -> Result<(Id, usize, Vec<Value>), PickleError> {
    let mut machine = Machine {
        bytes,
        at: 0,
        opcode_at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    Ok((root, machine.at, machine.values))
}

struct Machine<'b> {
    bytes: &'b [u8],
    at: usize,
    opcode_at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    memo: HashMap<u64, Id>,
}

type Step<T> = Result<T, PickleError>;

impl Machine<'_> {
    fn malformed<T>(&self, expected: &'static str) -> Step<T> {
        Err(PickleError::Malformed {
            offset: self.opcode_at,
            expected,
        })
    }

    fn take(&mut self, len: usize) -> Step<&[u8]> {
        let end = self
            .at
            .checked_add(len)
            .filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(PickleError::Truncated {
                offset: self.bytes.len(),
            });
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of up to eight bytes.
    fn number(&mut self, len: usize) -> Step<u64> {
        Ok(self
            .take(len)?
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn len(&mut self, width: usize) -> Step<usize> {
        let len = self.number(width)?;
        // A length past the end is caught by `take`.
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.bytes[self.at..];
        let Some(len) = rest.iter().take(4096).position(|&byte| byte == b'\n') else {
            return Err(PickleError::Truncated {
                offset: self.bytes.len(),
            });
        };
        let text = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(text)
    }

    fn push(&mut self, value: Value) -> Step<Id> {
        if self.values.len() >= MAX_VALUES {
            return Err(PickleError::TooMany {
                offset: self.opcode_at,
            });
        }
        self.values.push(value);
        let id = self.values.len() - 1;
        self.push_again(id)?;
        Ok(id)
    }

    /// A value that exists already, once more on the stack.
    fn push_again(&mut self, id: Id) -> Step<()> {
        if self.stack.len() >= MAX_VALUES {
            return Err(PickleError::TooMany {
                offset: self.opcode_at,
            });
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Step<Id> {
        match self.stack.pop() {
            Some(id) if self.values[id] != Value::Mark => Ok(id),
            _ => self.malformed("a value on the stack"),
        }
    }

    fn top(&self) -> Step<Id> {
        match self.stack.last() {
            Some(&id) if self.values[id] != Value::Mark => Ok(id),
            _ => self.malformed("a value on the stack"),
        }
    }

    /// Everything above the last mark, which goes too.
    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let Some(mark) = self
            .stack
            .iter()
            .rposition(|&id| self.values[id] == Value::Mark)
        else {
            return self.malformed("a mark on the stack");
        };
        let above = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(above)
    }

    fn text(&mut self, width: usize) -> Step<()> {
        let len = self.len(width)?;
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.push(Value::Text(text)).map(drop)
    }

    fn opaque(&mut self, width: usize) -> Step<()> {
        let len = self.len(width)?;
        self.take(len)?;
        self.push(Value::Opaque).map(drop)
    }

    fn remember(&mut self, key: u64) -> Step<()> {
        let id = self.top()?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Step<()> {
        match self.memo.get(&key) {
            Some(&id) => self.push_again(id),
            None => self.malformed("a value that was stored before"),
        }
    }

    fn run(&mut self) -> Step<Id> {
        loop {
            self.opcode_at = self.at;
            let opcode = self.byte()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let protocol = self.byte()?;
                    if !(2..=5).contains(&protocol) {
                        return self.malformed("pickle protocol 2 to 5");
                    }
                }
                0x95 => {
                    self.take(8)?;
                }
                b'(' => self.push(Value::Mark).map(drop)?,
                b'0' => self.pop().map(drop)?,
                b'1' => self.pop_mark().map(drop)?,
                b'2' => {
                    let id = self.top()?;
                    self.push_again(id)?;
                }
                b'N' => self.push(Value::None).map(drop)?,
                0x88 | 0x89 => self.push(Value::Bool(opcode == 0x88)).map(drop)?,
                b'J' => {
                    let raw = self.number(4)?.to_le_bytes();
                    let value = i32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                    self.push(Value::Int(value.into())).map(drop)?;
                }
                b'K' | b'M' => {
                    let value = self.number(if opcode == b'K' { 1 } else { 2 })?;
                    self.push(Value::Int(i64::try_from(value).unwrap_or(i64::MAX)))
                        .map(drop)?;
                }
                0x8a | 0x8b => self.long(if opcode == 0x8a { 1 } else { 4 })?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Opaque)?;
                }
                b'X' | b'T' => self.text(4)?,
                0x8c | b'U' => self.text(1)?,
                0x8d => self.text(8)?,
                b'B' => self.opaque(4)?,
                b'C' => self.opaque(1)?,
                0x8e | 0x96 => self.opaque(8)?,
                b')' => self.push(Value::Tuple(Vec::new())).map(drop)?,
                b']' => self.push(Value::List(Vec::new())).map(drop)?,
                b'}' => self.push(Value::Dict(Vec::new())).map(drop)?,
                0x8f => self.push(Value::Opaque).map(drop)?,
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => self.short_tuple(usize::from(opcode - 0x84))?,
                b'l' => {
                    let items = self.pop_mark()?;
                    self.push(Value::List(items))?;
                }
                b'd' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Dict(Vec::new()))?;
                    self.set_items(items)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(items)?;
                }
                0x90 => self.pop_mark().map(drop)?,
                0x91 => {
                    self.pop_mark()?;
                    self.push(Value::Opaque)?;
                }
                b'q' => {
                    let key = self.number(1)?;
                    self.remember(key)?;
                }
                b'r' => {
                    let key = self.number(4)?;
                    self.remember(key)?;
                }
                0x94 => {
                    let key = self.memo.len() as u64;
                    self.remember(key)?;
                }
                b'h' => {
                    let key = self.number(1)?;
                    self.recall(key)?;
                }
                b'j' => {
                    let key = self.number(4)?;
                    self.recall(key)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    match (self.values[module].clone(), self.values[name].clone()) {
                        (Value::Text(module), Value::Text(name)) => self.global(module, name)?,
                        _ => return self.malformed("the name of a global as text"),
                    }
                }
                b'Q' => self.persistent()?,
                b'R' | 0x81 => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    self.call(function, arguments)?;
                }
                0x92 => {
                    self.pop()?;
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    self.call(function, arguments)?;
                }
                // State of an object: dictionaries keep their items, the rest is of no use.
                b'b' => self.pop().map(drop)?,
                _ => {
                    return Err(PickleError::Opcode {
                        offset: self.opcode_at,
                        opcode,
                    });
                }
            }
        }
    }

    fn long(&mut self, width: usize) -> Step<()> {
        let len = self.len(width)?;
        let bytes = self.take(len)?;
        let value = if bytes.len() <= 8 {
            let negative = bytes.last().is_some_and(|&last| last >= 0x80);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            Value::Opaque
        };
        self.push(value).map(drop)
    }

    fn short_tuple(&mut self, len: usize) -> Step<()> {
        let mut items = Vec::with_capacity(len);
        for _ in 0..len {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items)).map(drop)
    }

    fn append(&mut self, items: Vec<Id>) -> Step<()> {
        let id = self.top()?;
        match &mut self.values[id] {
            Value::List(list) => list.extend(items),
            Value::Opaque => {}
            _ => return self.malformed("a list on the stack"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Step<()> {
        let id = self.top()?;
        if !items.len().is_multiple_of(2) {
            return self.malformed("keys and values in pairs");
        }
        match &mut self.values[id] {
            Value::Dict(dict) => dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Value::Opaque => {}
            _ => return self.malformed("a dictionary on the stack"),
        }
        Ok(())
    }

    fn global(&mut self, module: String, name: String) -> Step<()> {
        use crate::checkpoint::TensorDType as D;
        let known = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "HalfStorage") => Global::Storage(D::F16),
            ("torch", "BFloat16Storage") => Global::Storage(D::BF16),
            ("torch", "FloatStorage") => Global::Storage(D::F32),
            ("torch", "DoubleStorage") => Global::Storage(D::F64),
            ("torch", "LongStorage") => Global::Storage(D::I64),
            ("torch", "IntStorage") => Global::Storage(D::I32),
            ("torch", "ShortStorage") => Global::Storage(D::I16),
            ("torch", "CharStorage") => Global::Storage(D::I8),
            ("torch", "ByteStorage") => Global::Storage(D::U8),
            ("torch", "BoolStorage") => Global::Storage(D::Bool),
            ("torch.optim.lr_scheduler", "OneCycleLR") => Global::OneCycleLr,
            ("__builtin__" | "builtins", "getattr") => Global::Getattr,
            ("torch", "Size") => Global::Size,
            ("deepspeed.runtime.zero.config", "ZeroStageEnum") => Global::ZeroStage,
            ("__builtin__" | "builtins", "set" | "frozenset" | "complex" | "slice")
            | (
                "torch",
                "device" | "float32" | "float16" | "bfloat16" | "float64" | "int64",
            )
            | ("_codecs", "encode")
            // What DeepSpeed's engine saves beside the weights, and the arguments of a training script.
            | ("deepspeed.runtime.fp16.loss_scaler", "LossScaler" | "DynamicLossScaler")
            | ("deepspeed.utils.tensor_fragment", "fragment_address")
            | ("argparse", "Namespace")
            | ("numpy", "dtype" | "ndarray")
            | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct") => {
                Global::Inert
            }
            _ => {
                return Err(PickleError::Global {
                    offset: self.opcode_at,
                    module,
                    name,
                });
            }
        };
        self.push(Value::Global(known)).map(drop)
    }

    fn call(&mut self, function: Id, arguments: Id) -> Step<()> {
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return self.malformed("arguments as a tuple");
        };
        // No known function takes more; a hostile tuple is not copied for each of its calls.
        let arguments: Vec<Id> = arguments.iter().take(8).copied().collect();
        let result = match &self.values[function] {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => Value::Dict(Vec::new()),
            Value::Global(Global::RebuildTensor) => self.tensor(&arguments)?,
            Value::Global(Global::RebuildParameter) => {
                match arguments.first().map(|&id| &self.values[id]) {
                    Some(Value::Tensor(tensor)) => Value::Tensor(tensor.clone()),
                    _ => return self.malformed("a tensor as a parameter"),
                }
            }
            Value::Global(Global::Getattr) => match arguments.first().map(|&id| &self.values[id]) {
                Some(Value::Global(Global::OneCycleLr)) if arguments.len() == 2 => Value::Opaque,
                // Python 3.11 pickles a member of an enumeration by its name.
                Some(Value::Global(Global::ZeroStage)) if arguments.len() == 2 => {
                    match &self.values[arguments[1]] {
                        Value::Text(name) if name == "disabled" => Value::Int(0),
                        Value::Text(name) if name == "optimizer_states" => Value::Int(1),
                        Value::Text(name) if name == "gradients" => Value::Int(2),
                        Value::Text(name) if name == "weights" => Value::Int(3),
                        _ => return self.malformed("a stage of ZeRO"),
                    }
                }
                _ => {
                    return Err(PickleError::Call {
                        offset: self.opcode_at,
                        what: "getattr on something else than torch.optim.lr_scheduler.OneCycleLR \
                               and deepspeed.runtime.zero.config.ZeroStageEnum"
                            .into(),
                    });
                }
            },
            Value::Global(Global::Size) => match arguments.first().map(|&id| &self.values[id]) {
                Some(Value::Tuple(lens)) if lens.len() <= 16 => Value::Tuple(lens.clone()),
                _ => return self.malformed("a tuple of at most 16 lengths for torch.Size"),
            },
            Value::Global(Global::ZeroStage) => {
                match arguments.first().map(|&id| &self.values[id]) {
                    Some(Value::Int(stage)) => Value::Int(*stage),
                    _ => return self.malformed("the number of a stage of ZeRO"),
                }
            }
            Value::Global(Global::Inert | Global::OrderedDict) => Value::Opaque,
            other => {
                let what = match other {
                    Value::Global(global) => format!("{global:?}"),
                    _ => "a value that is no function".into(),
                };
                return Err(PickleError::Call {
                    offset: self.opcode_at,
                    what,
                });
            }
        };
        self.push(result).map(drop)
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, …)`.
    fn tensor(&self, arguments: &[Id]) -> Step<Value> {
        let [storage, offset, size, stride, ..] = arguments else {
            return self.malformed("four arguments of _rebuild_tensor_v2");
        };
        let Value::Storage(storage) = &self.values[*storage] else {
            return self.malformed("a storage as first argument of _rebuild_tensor_v2");
        };
        let (shape, strides) = (self.lens(*size)?, self.lens(*stride)?);
        let offset = self.len_of(*offset)?;
        if shape.len() != strides.len() {
            return self.malformed("as many strides as axes");
        }
        Ok(Value::Tensor(Rc::new(TensorValue {
            storage: storage.clone(),
            offset,
            shape,
            strides,
        })))
    }

    fn lens(&self, id: Id) -> Step<Vec<u64>> {
        match &self.values[id] {
            Value::Tuple(items) if items.len() <= 16 => {
                items.iter().map(|&item| self.len_of(item)).collect()
            }
            _ => self.malformed("a tuple of at most 16 lengths"),
        }
    }

    fn len_of(&self, id: Id) -> Step<u64> {
        match self.values[id] {
            Value::Int(value) => {
                u64::try_from(value).or_else(|_| self.malformed("a length of at least 0"))
            }
            _ => self.malformed("a whole number"),
        }
    }

    /// `('storage', type, key, location, elements)`.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let Value::Tuple(items) = &self.values[id] else {
            return self.malformed("a storage reference");
        };
        // The sixth of the legacy container told of views, before PyTorch 0.4.
        if items
            .get(5)
            .is_some_and(|&view| self.values[view] != Value::None)
        {
            return self.malformed("a storage that is no view of another one");
        }
        let parts: Vec<&Value> = items
            .iter()
            .take(5)
            .map(|&item| &self.values[item])
            .collect();
        let [
            Value::Text(tag),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            _,
            Value::Int(elements),
        ] = parts.as_slice()
        else {
            return self.malformed("a storage reference of tag, type, key, location and length");
        };
        if tag != "storage" || key.len() > 64 {
            return self.malformed("the tag 'storage' and a key of at most 64 characters");
        }
        let Ok(elements) = u64::try_from(*elements) else {
            return self.malformed("a storage of at least 0 elements");
        };
        let storage = Rc::new(StorageRef {
            dtype: *dtype,
            key: key.clone(),
            elements,
        });
        self.push(Value::Storage(storage)).map(drop)
    }
}
