//! Writing Python's pickle, protocol 2, as far as a checkpoint needs it.
//!
//! What comes out has the shape of what `torch.save` writes: globals by name, tensors as calls of
//! `_rebuild_tensor_v2` with a persistent id for the storage, strings remembered and repeated by number,
//! dictionaries filled in batches of a thousand.

use std::collections::HashMap;

/// A value to be pickled.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A `str`.
    Text(String),
    /// A `list`.
    List(Vec<Value>),
    /// A `tuple`.
    Tuple(Vec<Value>),
    /// A `dict`.
    Dict(Vec<(Value, Value)>),
    /// A `collections.OrderedDict`; the second part becomes its `__dict__`.
    Ordered(Vec<(Value, Value)>, Option<Box<Value>>),
    /// A class or function, by module and name.
    Global(&'static str, &'static str),
    /// A call of the first with the rest.
    Call(Box<Value>, Vec<Value>),
    /// A persistent id.
    Persistent(Box<Value>),
}

impl Value {
    /// A string.
    pub(crate) fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// A `dict` with string keys.
    pub(crate) fn dict<const N: usize>(entries: [(&str, Value); N]) -> Self {
        Self::Dict(
            entries
                .into_iter()
                .map(|(key, value)| (Self::text(key), value))
                .collect(),
        )
    }
}

/// Pickles one value.
pub(crate) fn pickle(value: &Value) -> Vec<u8> {
    let mut writer = Writer {
        bytes: vec![0x80, 2],
        memo: HashMap::new(),
        remembered: 0,
    };
    writer.value(value);
    writer.bytes.push(b'.');
    writer.bytes
}

/// How many entries go into one `SETITEMS` or `APPENDS`.
const BATCH: usize = 1000;

struct Writer {
    bytes: Vec<u8>,
    /// Strings, and globals as `module name`, already written.
    memo: HashMap<String, u32>,
    remembered: u32,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::None => self.bytes.push(b'N'),
            Value::Bool(false) => self.bytes.push(0x89),
            Value::Bool(true) => self.bytes.push(0x88),
            Value::Int(number) => self.int(*number),
            Value::Float(number) => {
                self.bytes.push(b'G');
                self.bytes.extend_from_slice(&number.to_be_bytes());
            }
            Value::Text(text) => self.text(text),
            Value::List(items) => {
                self.bytes.push(b']');
                self.remember();
                for batch in items.chunks(BATCH) {
                    self.batch(batch.len(), b'a', b'e', |writer| {
                        batch.iter().for_each(|item| writer.value(item))
                    });
                }
            }
            Value::Tuple(items) => self.tuple(items),
            Value::Dict(entries) => {
                self.bytes.push(b'}');
                self.remember();
                self.entries(entries);
            }
            Value::Ordered(entries, state) => {
                self.global("collections", "OrderedDict");
                self.bytes.extend_from_slice(b")R");
                self.remember();
                self.entries(entries);
                if let Some(state) = state {
                    self.value(state);
                    self.bytes.push(b'b');
                }
            }
            Value::Global(module, name) => self.global(module, name),
            Value::Call(function, arguments) => {
                self.value(function);
                self.tuple(arguments);
                self.bytes.push(b'R');
                self.remember();
            }
            Value::Persistent(id) => {
                self.value(id);
                self.bytes.push(b'Q');
            }
        }
    }

    fn int(&mut self, number: i64) {
        if let Ok(byte) = u8::try_from(number) {
            self.bytes.extend_from_slice(&[b'K', byte]);
        } else if let Ok(short) = u16::try_from(number) {
            self.bytes.push(b'M');
            self.bytes.extend_from_slice(&short.to_le_bytes());
        } else if let Ok(int) = i32::try_from(number) {
            self.bytes.push(b'J');
            self.bytes.extend_from_slice(&int.to_le_bytes());
        } else {
            self.bytes.extend_from_slice(&[0x8a, 8]);
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
    }

    fn text(&mut self, text: &str) {
        if self.recall(text) {
            return;
        }
        self.bytes.push(b'X');
        // Keys are far shorter than 4 GiB; a longer one would be a bug of the layout.
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(text.as_bytes());
        self.memo.insert(text.to_owned(), self.remembered);
        self.remember();
    }

    fn global(&mut self, module: &str, name: &str) {
        // A line feed cannot stand in a key, so the two kinds of entries never meet.
        let key = format!("{module}\n{name}");
        if self.recall(&key) {
            return;
        }
        self.bytes.push(b'c');
        self.bytes.extend_from_slice(format!("{key}\n").as_bytes());
        self.memo.insert(key, self.remembered);
        self.remember();
    }

    fn tuple(&mut self, items: &[Value]) {
        if items.is_empty() {
            self.bytes.push(b')');
            return;
        }
        if items.len() > 3 {
            self.bytes.push(b'(');
        }
        for item in items {
            self.value(item);
        }
        self.bytes.push(match items.len() {
            1 => 0x85,
            2 => 0x86,
            3 => 0x87,
            _ => b't',
        });
        self.remember();
    }

    fn entries(&mut self, entries: &[(Value, Value)]) {
        for batch in entries.chunks(BATCH) {
            self.batch(batch.len(), b's', b'u', |writer| {
                for (key, value) in batch {
                    writer.value(key);
                    writer.value(value);
                }
            });
        }
    }

    fn batch(&mut self, len: usize, one: u8, many: u8, write: impl FnOnce(&mut Self)) {
        if len > 1 {
            self.bytes.push(b'(');
        }
        write(self);
        self.bytes.push(if len > 1 { many } else { one });
    }

    /// Gives the last value the next number.
    fn remember(&mut self) {
        match u8::try_from(self.remembered) {
            Ok(place) => self.bytes.extend_from_slice(&[b'q', place]),
            Err(_) => {
                self.bytes.push(b'r');
                self.bytes.extend_from_slice(&self.remembered.to_le_bytes());
            }
        }
        self.remembered += 1;
    }

    /// Repeats a value written before; false if there is none.
    fn recall(&mut self, key: &str) -> bool {
        let Some(place) = self.memo.get(key) else {
            return false;
        };
        match u8::try_from(*place) {
            Ok(place) => self.bytes.extend_from_slice(&[b'h', place]),
            Err(_) => {
                self.bytes.push(b'j');
                self.bytes.extend_from_slice(&place.to_le_bytes());
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_dictionary_is_written_as_python_writes_it() {
        // pickle.dumps({'epoch': 149, 'lrs': [0.5], 'again': 'epoch'}, protocol=2), of one interned 'epoch'
        let value = Value::dict([
            ("epoch", Value::Int(149)),
            ("lrs", Value::List(vec![Value::Float(0.5)])),
            ("again", Value::text("epoch")),
        ]);
        let expected = b"\x80\x02}q\x00(X\x05\x00\x00\x00epochq\x01K\x95X\x03\x00\x00\x00lrsq\x02]q\x03G?\xe0\x00\x00\x00\x00\x00\x00aX\x05\x00\x00\x00againq\x04h\x01u.";
        assert_eq!(pickle(&value), expected);
    }

    #[test]
    fn integers_take_the_shortest_form() {
        let written = |number| {
            let bytes = pickle(&Value::Int(number));
            bytes[2..bytes.len() - 1].to_vec()
        };
        assert_eq!(written(255), [b'K', 255]);
        assert_eq!(written(256), [b'M', 0, 1]);
        assert_eq!(written(-1), [b'J', 255, 255, 255, 255]);
        assert_eq!(written(65_536), [b'J', 0, 0, 1, 0]);
        assert_eq!(written(1 << 33), [0x8a, 8, 0, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn long_dictionary_is_filled_in_batches() {
        let entries = (0..2001)
            .map(|_| (Value::Bool(true), Value::None))
            .collect();
        let bytes = pickle(&Value::Dict(entries));
        // Two full batches with SETITEMS, the last entry alone with SETITEM.
        assert_eq!(bytes[bytes.len() - 2..], *b"s.");
        assert_eq!(bytes.iter().filter(|byte| **byte == b'u').count(), 2);
    }
}
