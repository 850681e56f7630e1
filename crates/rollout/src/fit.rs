//! Attention within the limits of messages: rows of the tokens that somebody needs, as many as there is room for beside the texts.
//! Must not know: who needs them.

use unveil_core::Attention;
use unveil_proto::{attention_to_wire, v1};

/// Bytes of a message that the frame around rows may take, by response.
const FRAME: usize = 64;
/// Bytes of a row beside its values: the number of its token.
const NUMBER: usize = 6;

/// Rows of one response, and the tokens that they are needed of, those that are needed most first.
pub(crate) struct Rows {
    pub all: Option<Attention>,
    pub needed: Vec<usize>,
}

/// Puts the needed rows into `responses`, which are part of a message that has `length` bytes without them and may have `limit`. Where
/// there is no room for all, the rows that are needed least are left out. Returns how many are.
pub(crate) fn fill(responses: &mut [v1::Response], rows: &[Rows], length: usize, limit: usize) -> usize {
    let share = limit.saturating_sub(length) / responses.len().max(1);
    let mut left_out = 0;
    for (response, rows) in responses.iter_mut().zip(rows) {
        let Some(all) = &rows.all else { continue };
        let bytes = all.grid[0].saturating_mul(all.grid[1]).saturating_mul(4).saturating_add(NUMBER);
        let room = share.saturating_sub(FRAME) / bytes.max(1);
        let there: Vec<usize> = rows.needed.iter().copied().filter(|t| all.tokens.contains(t)).collect();
        let chosen = &there[..there.len().min(room)];
        left_out += there.len() - chosen.len();
        response.attention = part(all, chosen).as_ref().map(attention_to_wire);
    }
    left_out
}

/// The rows of `tokens`, in the order of the response; none where there is none.
fn part(all: &Attention, tokens: &[usize]) -> Option<Attention> {
    let rows = all.tokens.iter().zip(&all.rows).filter(|(t, _)| tokens.contains(t));
    let (tokens, rows): (Vec<usize>, Vec<Vec<f32>>) = rows.map(|(t, row)| (*t, row.clone())).unzip();
    (!rows.is_empty()).then_some(Attention { grid: all.grid, tokens, rows })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn rows(cells: usize, tokens: usize, needed: Vec<usize>) -> Rows {
        let grid = [1, cells];
        let all = Attention { grid, tokens: (0..tokens).collect(), rows: vec![vec![0.5; cells]; tokens] };
        Rows { all: Some(all), needed }
    }

    fn message(responses: Vec<v1::Response>) -> v1::ScoreRequest {
        v1::ScoreRequest { record_json: "{}".into(), responses, ..Default::default() }
    }

    #[test]
    fn what_is_needed_most_is_there_and_in_order() {
        let mut responses = vec![v1::Response::default()];
        let row = rows(10, 6, vec![4, 1, 9, 5]);
        assert_eq!(fill(&mut responses, std::slice::from_ref(&row), 0, 1 << 20), 0);
        assert_eq!(responses[0].attention.as_ref().map(|a| a.tokens.clone()), Some(vec![1, 4, 5]), "9 has no row");
        assert_eq!(fill(&mut responses, std::slice::from_ref(&row), 0, FRAME + 2 * 46), 1);
        assert_eq!(responses[0].attention.as_ref().map(|a| a.tokens.clone()), Some(vec![1, 4]));
        assert_eq!(fill(&mut responses, &[row], 100, 100), 3);
        assert_eq!(responses[0].attention, None);
    }

    /// The longest response that a configuration allows, in the worst of numbers.
    fn longest(index: u32, tokens: usize) -> v1::Response {
        let text = "x".repeat(128 * tokens);
        let span = |t: usize| v1::TokenSpan { begin: (128 * t) as u32, end: (128 * t + 128) as u32 };
        v1::Response {
            index,
            tokens: vec![u32::MAX; tokens],
            logprobs: vec![-1.0; tokens],
            versions: vec![u64::MAX; tokens],
            spans: (0..tokens).map(span).collect(),
            finish: "cancelled".into(),
            text,
            attention: None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn what_an_accepted_configuration_makes_fits(
            n in 1..65usize, tokens in 1..3000usize, mib in 1..4usize, cells in 1..20_000usize,
        ) {
            let sets = [
                format!("rollout.n={n}"),
                format!("rollout.max_new_tokens={tokens}"),
                format!("rollout.max_rows={}", n.max(256)),
                "learner.algorithm=\"ppo\"".to_owned(),
                format!("reward.service.max_message_mib={mib}"),
            ];
            let config = unveil_config::load(None, &sets);
            prop_assume!(config.is_ok());
            let mut m = message((0..n as u32).map(|i| longest(i, tokens)).collect());
            m.record_json = "x".repeat(64 << 10);
            let length = m.encoded_len();
            prop_assert!(length <= mib << 20, "{n} x {tokens}: {length} of {mib} MiB");
            let few = tokens.min(3);
            let all: Vec<Rows> = (0..n).map(|_| rows(cells, few, (0..few).collect())).collect();
            fill(&mut m.responses, &all, length, mib << 20);
            prop_assert!(m.encoded_len() <= mib << 20, "{} of {mib} MiB", m.encoded_len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn no_message_is_larger_than_it_may_be(
            n in 1..9usize, cells in 1..600usize, tokens in 1..90usize, text in 0..400usize, limit in 2000..200_000usize,
        ) {
            let response = |index| v1::Response { index, text: "x".repeat(text), ..Default::default() };
            let mut m = message((0..n as u32).map(response).collect());
            let length = m.encoded_len();
            prop_assume!(length <= limit);
            let all: Vec<Rows> = (0..n).map(|_| rows(cells, tokens, (0..tokens).collect())).collect();
            let left_out = fill(&mut m.responses, &all, length, limit);
            prop_assert!(m.encoded_len() <= limit, "{} of {limit}", m.encoded_len());
            let sent: usize = m.responses.iter().map(|r| r.attention.as_ref().map_or(0, |a| a.tokens.len())).sum();
            prop_assert_eq!(sent + left_out, n * tokens);
        }
    }
}
