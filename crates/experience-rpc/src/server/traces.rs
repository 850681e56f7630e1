//! Traces of the groups in progress: one span per group from its first lease to its update, the parent of all its other
//! spans. Nothing is stored if tracing is disabled.

use std::collections::HashMap;

use tracing::Span;
use unveil_core::GroupId;
use unveil_service::span;

/// Spans of groups between lease and update.
#[derive(Default, Debug)]
pub(super) struct Traces(HashMap<GroupId, Span>);

impl Traces {
    /// Returns the span of a group; a group that is leased again keeps its trace.
    pub(super) fn group(&mut self, id: &GroupId) -> Span {
        if let Some(span) = self.0.get(id) {
            return span.clone();
        }
        let span = span!(parent: None, "group", record = id.record, pass = id.pass, position = id.position);
        if !span.is_disabled() {
            self.0.insert(id.clone(), span.clone());
        }
        span
    }

    /// Creates a span for update `step` under each of its groups.
    pub(super) fn train<'a>(&self, step: u64, ids: impl Iterator<Item = &'a GroupId>) -> Vec<Span> {
        ids.filter_map(|id| self.0.get(id)).map(|group| span!(parent: group, "train", step)).collect()
    }

    /// Ends the traces of groups.
    pub(super) fn end<'a>(&mut self, ids: impl Iterator<Item = &'a GroupId>) {
        ids.for_each(|id| drop(self.0.remove(id)));
    }
}
