//! A pickle reader that executes nothing.
//!
//! Python's pickle is a program for a stack machine that may call any function. This machine knows
//! the opcodes of protocols 2 to 4 and a closed list of globals; every other global is refused by
//! name and byte offset when it is loaded. What training leaves in a checkpoint beside tensors
//! becomes an opaque value. Values live in one arena, so that neither depth nor sharing of a
//! hostile file can exhaust stack or memory.

mod machine;

use std::rc::Rc;

/// Most values one pickle may build, and most places on its stack.
const MAX_VALUES: usize = 4_000_000;
/// Longest name of a tensor, dictionary key or storage.
pub(super) const MAX_NAME_BYTES: usize = 1024;

/// Index of a value in its arena.
pub(super) type Id = usize;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    /// Floats, bytes, sets, random states: of no use here.
    Opaque,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Rc<StorageRef>),
    Tensor(Rc<TensorValue>),
    Mark,
}

/// The functions and classes that may occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(super::TensorDType),
    /// `torch.optim.lr_scheduler.OneCycleLR`, whose function a scheduler's state names.
    OneCycleLr,
    /// `getattr`, only to be applied to [`Global::OneCycleLr`]; never called.
    Getattr,
    /// `torch.Size`: a call gives its tuple.
    Size,
    /// DeepSpeed's `ZeroStageEnum`: a call gives its number.
    ZeroStage,
    /// Calls give opaque values.
    Inert,
}

/// A storage as a pickle names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StorageRef {
    pub(super) dtype: super::TensorDType,
    pub(super) key: String,
    pub(super) elements: u64,
}

/// A tensor as a pickle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorValue {
    pub(super) storage: Rc<StorageRef>,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// Why a pickle is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// A class or function outside the list.
    #[error(
        "byte {offset}: the pickle asks for {module}.{name}, which no MindEye2 checkpoint needs: refused, nothing was executed"
    )]
    Global {
        /// Offset in the pickle.
        offset: usize,
        /// Module asked for.
        module: String,
        /// Name asked for.
        name: String,
    },
    /// A call that is refused.
    #[error("byte {offset}: the pickle calls {what}: refused, nothing was executed")]
    Call {
        /// Offset in the pickle.
        offset: usize,
        /// What is called.
        what: String,
    },
    /// An opcode this reader does not know.
    #[error("byte {offset}: unknown pickle opcode 0x{opcode:02x}")]
    Opcode {
        /// Offset in the pickle.
        offset: usize,
        /// The opcode.
        opcode: u8,
    },
    /// The pickle ends early.
    #[error("byte {offset}: the pickle ends early")]
    Truncated {
        /// Offset in the pickle.
        offset: usize,
    },
    /// Not what a pickle may do at this place.
    #[error("byte {offset}: expected {expected}")]
    Malformed {
        /// Offset in the pickle.
        offset: usize,
        /// What is needed here.
        expected: &'static str,
    },
    /// More values than any checkpoint has.
    #[error("byte {offset}: more than {MAX_VALUES} values")]
    TooMany {
        /// Offset in the pickle.
        offset: usize,
    },
}

/// A pickle that was read: its values, its result and where it ended.
#[derive(Debug)]
pub(super) struct Pickled {
    values: Vec<Value>,
    pub(super) root: Id,
    pub(super) len_bytes: usize,
}

impl Pickled {
    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// Every storage that is named anywhere.
    pub(super) fn storages(&self) -> impl Iterator<Item = &StorageRef> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(storage) => Some(&**storage),
            _ => None,
        })
    }

    /// The value of a key of a dictionary; the last one where it stands several times, as in Python.
    pub(super) fn item(&self, dict: Id, key: &str) -> Option<Id> {
        let Value::Dict(items) = self.get(dict) else {
            return None;
        };
        let named = |id: Id| matches!(self.get(id), Value::Text(text) if text == key);
        items
            .iter()
            .rev()
            .find(|(name, _)| named(*name))
            .map(|(_, value)| *value)
    }

    /// Lengths of the axes in a tuple or list.
    pub(super) fn axes(&self, id: Id) -> Option<Vec<u64>> {
        let (Value::Tuple(items) | Value::List(items)) = self.get(id) else {
            return None;
        };
        if items.len() > 16 {
            return None;
        }
        items
            .iter()
            .map(|&item| match self.get(item) {
                Value::Int(len) => u64::try_from(*len).ok(),
                _ => None,
            })
            .collect()
    }
}

/// Reads one pickle from the front of `bytes`.
pub(super) fn read(bytes: &[u8]) -> Result<Pickled, PickleError> {
    let (root, len_bytes, values) = machine::run(bytes)?;
    Ok(Pickled {
        root,
        len_bytes,
        values,
    })
}
