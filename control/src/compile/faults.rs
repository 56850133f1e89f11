//! What the compiler finds wrong, before it is known what that means.

use crate::objects::{Object, ObjectId};

/// Something wrong with an object in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Whose fault.
    pub object: ObjectId,
    /// The field, a JSON pointer.
    pub pointer: String,
    /// What is wrong and what to do.
    pub message: String,
    /// The object makes no sense, so that its last good version is better; otherwise it is only worth telling.
    pub refused: bool,
}

/// Collects faults.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// The object makes no sense.
    pub(super) fn refuse(&mut self, object: &Object, pointer: impl Into<String>, message: impl Into<String>) {
        self.push(object, pointer.into(), message.into(), true);
    }

    /// The object is in force, but not all that it asks for can be done.
    pub(super) fn note(&mut self, object: &Object, pointer: impl Into<String>, message: impl Into<String>) {
        self.push(object, pointer.into(), message.into(), false);
    }

    /// All of them.
    pub(super) fn into_vec(self) -> Vec<Fault> {
        self.0
    }

    fn push(&mut self, object: &Object, pointer: String, message: String, refused: bool) {
        self.0.push(Fault { object: object.id.clone(), pointer, message, refused });
    }
}
