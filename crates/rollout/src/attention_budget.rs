//! Fits attention rows into messages: attaches the rows of needed tokens, as many as the size limit leaves room for next to the texts.

use unveil_core::Attention;
use unveil_proto::{attention_to_wire, v1};

/// Bytes of a message for the encoding around the rows of one response.
const RESPONSE_OVERHEAD: usize = 64;
/// Bytes of a row in addition to its values: the index of its token.
const ROW_OVERHEAD: usize = 6;

/// Attention of one response, and the tokens whose rows are needed, the most important first.
pub(crate) struct NeededRows {
    pub attention: Option<Attention>,
    pub needed: Vec<usize>,
}

/// Attaches the needed rows to `responses`, which are part of a message of `length` bytes without them and at most `limit` with them.
/// The least important rows are left out if there is not enough room for all. Returns the number of rows left out.
pub(crate) fn attach_rows(responses: &mut [v1::Response], rows: &[NeededRows], length: usize, limit: usize) -> usize {
    let share = limit.saturating_sub(length) / responses.len().max(1);
    let mut left_out = 0;
    for (response, rows) in responses.iter_mut().zip(rows) {
        let Some(attention) = &rows.attention else { continue };
        let row_bytes =
            attention.grid[0].saturating_mul(attention.grid[1]).saturating_mul(4).saturating_add(ROW_OVERHEAD);
        let max_rows = share.saturating_sub(RESPONSE_OVERHEAD) / row_bytes.max(1);
        let available: Vec<usize> = rows.needed.iter().copied().filter(|t| attention.tokens.contains(t)).collect();
        let chosen = &available[..available.len().min(max_rows)];
        left_out += available.len() - chosen.len();
        response.attention = select_rows(attention, chosen).as_ref().map(attention_to_wire);
    }
    left_out
}

/// Returns the rows of `tokens` in the order of the response; `None` if there are none.
fn select_rows(attention: &Attention, tokens: &[usize]) -> Option<Attention> {
    let rows = attention.tokens.iter().zip(&attention.rows).filter(|(t, _)| tokens.contains(t));
    let (tokens, rows): (Vec<usize>, Vec<Vec<f32>>) = rows.map(|(t, row)| (*t, row.clone())).unzip();
    (!rows.is_empty()).then_some(Attention { grid: attention.grid, tokens, rows })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn rows(cells: usize, tokens: usize, needed: Vec<usize>) -> NeededRows {
        let grid = [1, cells];
        let attention = Attention { grid, tokens: (0..tokens).collect(), rows: vec![vec![0.5; cells]; tokens] };
        NeededRows { attention: Some(attention), needed }
    }

    fn message(responses: Vec<v1::Response>) -> v1::ScoreRequest {
        v1::ScoreRequest { record_json: "{}".into(), responses, ..Default::default() }
    }

    #[test]
    fn most_important_rows_are_attached_in_order() {
        let mut responses = vec![v1::Response::default()];
        let row = rows(10, 6, vec![4, 1, 9, 5]);
        assert_eq!(attach_rows(&mut responses, std::slice::from_ref(&row), 0, 1 << 20), 0);
        assert_eq!(responses[0].attention.as_ref().map(|a| a.tokens.clone()), Some(vec![1, 4, 5]), "9 has no row");
        assert_eq!(attach_rows(&mut responses, std::slice::from_ref(&row), 0, RESPONSE_OVERHEAD + 2 * 46), 1);
        assert_eq!(responses[0].attention.as_ref().map(|a| a.tokens.clone()), Some(vec![1, 4]));
        assert_eq!(attach_rows(&mut responses, &[row], 100, 100), 3);
        assert_eq!(responses[0].attention, None);
    }

    /// Returns the longest response that a configuration allows, with the numbers that take most bytes.
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
        fn responses_of_a_valid_configuration_fit(
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
            let all: Vec<NeededRows> = (0..n).map(|_| rows(cells, few, (0..few).collect())).collect();
            attach_rows(&mut m.responses, &all, length, mib << 20);
            prop_assert!(m.encoded_len() <= mib << 20, "{} of {mib} MiB", m.encoded_len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn messages_stay_within_their_limit(
            n in 1..9usize, cells in 1..600usize, tokens in 1..90usize, text in 0..400usize, limit in 2000..200_000usize,
        ) {
            let response = |index| v1::Response { index, text: "x".repeat(text), ..Default::default() };
            let mut m = message((0..n as u32).map(response).collect());
            let length = m.encoded_len();
            prop_assume!(length <= limit);
            let all: Vec<NeededRows> = (0..n).map(|_| rows(cells, tokens, (0..tokens).collect())).collect();
            let left_out = attach_rows(&mut m.responses, &all, length, limit);
            prop_assert!(m.encoded_len() <= limit, "{} of {limit}", m.encoded_len());
            let sent: usize = m.responses.iter().map(|r| r.attention.as_ref().map_or(0, |a| a.tokens.len())).sum();
            prop_assert_eq!(sent + left_out, n * tokens);
        }
    }
}
