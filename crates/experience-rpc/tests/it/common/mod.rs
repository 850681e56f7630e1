//! Fixtures: a prepared group without an image, a reward breakdown, settings, and a server that publishes computed weights.

pub mod weight_sync;

use std::collections::BTreeMap;

use unveil_core::{Breakdown, Component, Grid, GroupInput, MaskReason, Prompt};
use unveil_experience::Settings;

/// Returns a prompt of two tokens without an image.
pub fn text_input(id: &str, index: usize) -> GroupInput {
    let line = format!(
        r#"{{"id":"{id}","image_size":[64,64],"category":"x","boxes":[[0.0,0.0,16.0,16.0]],"question":"q","image":"i.png"}}"#
    );
    GroupInput {
        record: serde_json::from_str(&line).unwrap(),
        image_size: (64, 64),
        prompt: Prompt { tokens: vec![1, index as u32], grids: vec![] },
        patches: vec![],
        merged: Grid { rows: 2, cols: 2 },
        encoded: Default::default(),
    }
}

pub fn breakdown(id: &str, index: usize, total: Option<f64>) -> Breakdown {
    let component = total.map_or_else(|| Component::masked(MaskReason::NoAttention), Component::value);
    Breakdown { id: id.into(), index, total, components: BTreeMap::from([("toy".into(), component)]) }
}

/// Returns strictly on-policy settings of an experience server; a worker is lost after `lease_s` seconds of silence.
pub fn experience_settings(groups_per_step: usize, lease_s: f64) -> Settings {
    Settings {
        groups_per_step,
        max_staleness: 0,
        lease_s,
        stall_s: 300.0,
        silence_s: lease_s,
        seed: 0,
        term: 1,
        total_groups: None,
    }
}
