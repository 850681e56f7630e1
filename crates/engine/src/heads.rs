//! Attention of every head by itself over given responses, for calibration. A pass of its own beside [`Engine::score`].

use std::borrow::Borrow;

use unveil_model::{PackedBatch, PackedGroup, Vlm};

use crate::engine::host;
use crate::request::ScoreRequest;
use crate::{Engine, EngineError, Result};

/// Mean row of some response tokens, for every head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadRows {
    /// Heads of a layer.
    pub heads: usize,
    /// Image tokens: values per row.
    pub cells: usize,
    /// Rows by layer, then head; each sums to 1.
    pub values: Vec<f32>,
}

impl HeadRows {
    /// `(layer, head, row)` of every head, both counted from 0.
    pub fn rows(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let heads = self.heads.max(1);
        self.values.chunks_exact(self.cells.max(1)).enumerate().map(move |(i, row)| (i / heads, i % heads, row))
    }
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Mean over the tokens `named[i]` of response i of their rows, for every layer and head, whatever the options capture; none where
    /// `named[i]` is empty. All of the request runs in one pass, and each response takes layers * heads * image tokens numbers.
    ///
    /// # Errors
    /// What [`Engine::score`] refuses, a prompt without an image, or a token that is not there; the message names the group.
    pub fn head_rows(&mut self, request: &ScoreRequest, named: &[Vec<usize>]) -> Result<Vec<Option<HeadRows>>> {
        let _guard = tch::no_grad_guard();
        self.check_scored(request)?;
        let refuse = |what: String| Err(EngineError::request(&request.input.id, what));
        if named.len() != request.responses.len() {
            return refuse(format!("{} lists of tokens for {} responses", named.len(), request.responses.len()));
        }
        if request.input.prompt.grids.is_empty() {
            return refuse("the prompt has no image that heads could look at".to_owned());
        }
        let mut out: Vec<Option<HeadRows>> = vec![None; named.len()];
        let wanted: Vec<usize> = (0..named.len()).filter(|&i| !named[i].is_empty()).collect();
        if wanted.is_empty() {
            return Ok(out);
        }
        let (mut sets, mut first) = (Vec::with_capacity(wanted.len()), 0);
        for &i in &wanted {
            let count = request.responses[i].len();
            if let Some(token) = named[i].iter().find(|t| **t >= count) {
                return refuse(format!("token {token} is not among the {count} of response {i}"));
            }
            sets.push(named[i].iter().map(|t| first + t).collect::<Vec<usize>>());
            first += count;
        }
        let features = self.encode(std::iter::once(&request.input))?;
        let vlm = self.vlm.borrow();
        let group = PackedGroup {
            prompt: request.input.prompt.clone(),
            responses: wanted.iter().map(|&i| request.responses[i].clone()).collect(),
        };
        let batch = PackedBatch::build(&[group], vlm.config(), vlm.device())?;
        let rows = vlm.head_rows(&batch, features.as_ref(), &sets)?;
        let (heads, cells) = (vlm.config().text.num_attention_heads.max(0) as usize, batch.image_tokens[0]);
        for (at, &i) in wanted.iter().enumerate() {
            out[i] = Some(HeadRows { heads, cells, values: host(&rows.get(at as i64))? });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use unveil_model::AttentionSet;

    use super::*;
    use crate::fixture::{EOS, input, model, request};
    use crate::{EngineOptions, GroupInput};

    fn near(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-5)
    }

    /// What generation captures of some heads is the mean of what this pass finds of each.
    #[test]
    fn heads_by_themselves_make_up_what_generation_captures() {
        let vlm = model(1);
        let chosen = [[1, 2], [1, 0], [3, 1]];
        let options = EngineOptions { capture: Some(AttentionSet::new(&[], &chosen)), ..Default::default() };
        let mut engine = Engine::new(&vlm, options).unwrap();
        let made = engine.generate(&[request(&vlm, 1, 0.9)], None).unwrap();
        let responses: Vec<Vec<u32>> = made[0].responses.iter().map(|r| r.tokens.clone()).collect();
        // The first and the last token that was fed, of all responses but one.
        let fed = |i: usize| made[0].responses[i].attention.as_ref().map_or(0, |a| a.len());
        let tokens = |i: usize| if i == 1 { Vec::new() } else { (0..fed(i)).step_by(fed(i).max(2) - 1).collect() };
        let named: Vec<Vec<usize>> = (0..4).map(tokens).collect();
        assert!(named.iter().filter(|n| n.len() > 1).count() > 1, "{named:?}");
        let request = ScoreRequest { input: input(&vlm, 1), responses };
        let rows = engine.head_rows(&request, &named).unwrap();
        assert!(rows[1].is_none());
        let text = &vlm.config().text;
        for (i, rows) in rows.iter().enumerate().filter_map(|(i, r)| Some((i, r.as_ref()?))) {
            assert_eq!(rows.rows().count(), text.num_hidden_layers * text.num_attention_heads as usize);
            let (mut heads, mut captured) = (vec![0f32; rows.cells], vec![0f32; rows.cells]);
            for (_, _, row) in rows.rows().filter(|(layer, head, _)| chosen.contains(&[*layer, *head])) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                heads.iter_mut().zip(row).for_each(|(h, p)| *h += p / 3.0);
            }
            let seen = made[0].responses[i].attention.as_ref().unwrap();
            for token in &named[i] {
                let share = named[i].len() as f32;
                captured.iter_mut().zip(seen.row(*token).unwrap()).for_each(|(c, p)| *c += p / share);
            }
            assert!(near(&heads, &captured), "response {i}: {heads:?} {captured:?}");
        }
        assert_eq!(engine.head_rows(&request, &vec![vec![]; 4]).unwrap(), vec![None; 4]);
    }

    #[test]
    fn what_cannot_be_asked_names_the_group() {
        let vlm = model(4);
        let mut engine = Engine::new(&vlm, EngineOptions::default()).unwrap();
        let given = ScoreRequest { input: input(&vlm, 0), responses: vec![vec![5, 6, EOS]] };
        let bare = GroupInput {
            prompt: unveil_model::Prompt { tokens: vec![1, 2], grids: vec![] },
            patches: Default::default(),
            ..input(&vlm, 0)
        };
        let mut refuse = |request: &ScoreRequest, named: &[Vec<usize>]| {
            let text = engine.head_rows(request, named).unwrap_err().to_string();
            assert!(text.contains("g0"), "{text}");
            text
        };
        assert!(refuse(&given, &[]).contains("0 lists"));
        assert!(refuse(&given, &[vec![3]]).contains("token 3 is not among the 3"));
        assert!(refuse(&ScoreRequest { input: bare, ..given.clone() }, &[vec![0]]).contains("no image"));
        let odd = ScoreRequest { responses: vec![vec![999]], ..given };
        assert!(refuse(&odd, &[vec![0]]).contains("999"));
    }
}
