//! What the compiler finds wrong, before it is known what that means.

use crate::objects::{Object, ObjectId};
use crate::outcome::{Finding, Reason};

/// Something wrong with an object in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Whose fault.
    pub object: ObjectId,
    /// Of what kind.
    pub reason: Reason,
    /// The field, a JSON pointer.
    pub pointer: String,
    /// What is wrong and what to do.
    pub message: String,
    /// The object makes no sense, so that its last good version is better; otherwise it is only worth telling.
    pub refused: bool,
}

impl Fault {
    /// As whoever wrote the object is told.
    pub(super) fn finding(&self) -> Finding {
        Finding {
            reason: self.reason,
            pointer: self.pointer.clone(),
            message: self.message.clone(),
            refused: self.refused,
        }
    }
}

/// Collects faults.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// The object makes no sense.
    pub(super) fn refuse(&mut self, object: &Object, pointer: impl Into<String>, message: impl Into<String>) {
        self.refuse_as(Reason::Value, object, pointer, message);
    }

    /// The object makes no sense, for a reason that has a name.
    pub(super) fn refuse_as(
        &mut self,
        reason: Reason,
        object: &Object,
        pointer: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.push(reason, object, pointer.into(), message.into(), true);
    }

    /// The object is in force, but not all that it asks for can be done.
    pub(super) fn note(&mut self, object: &Object, pointer: impl Into<String>, message: impl Into<String>) {
        self.note_as(Reason::Value, object, pointer, message);
    }

    /// The object is in force, but not all that it asks for can be done, for a reason that has a name.
    pub(super) fn note_as(
        &mut self,
        reason: Reason,
        object: &Object,
        pointer: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.push(reason, object, pointer.into(), message.into(), false);
    }

    /// All of them.
    pub(super) fn into_vec(self) -> Vec<Fault> {
        self.0
    }

    fn push(&mut self, reason: Reason, object: &Object, pointer: String, message: String, refused: bool) {
        self.0.push(Fault { object: object.id.clone(), reason, pointer, message, refused });
    }
}
