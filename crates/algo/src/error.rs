//! What can be wrong with the inputs of an advantage or a loss. Owns the wording. Must not know: what the numbers mean.

/// Inputs that do not fit together, or that hold a number which cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AlgoError {
    /// A tensor or series has another shape than the batch needs.
    #[error("`{what}` has shape {found:?} where {expected:?} is needed")]
    Shape {
        /// Which one.
        what: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The shape that was needed.
        expected: Vec<i64>,
    },
    /// A term needs an input that was not given.
    #[error("the {term} term has a weight but `{input}` was not given")]
    Missing {
        /// Which term.
        term: &'static str,
        /// Which input.
        input: &'static str,
    },
    /// No term of the objective has a weight.
    #[error("no term of the objective has a weight: there is nothing to differentiate")]
    Empty,
    /// A number that is not finite.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Torch(#[from] tch::TchError),
}

/// A number that is NaN or infinite, and where it is. All positions count from 0.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the {what} of {}response {response} of group {group} is {value}: leave the group out, or find out what made it", .token.map_or_else(String::new, |t| format!("token {t} of ")))]
pub struct NotFinite {
    /// What it is, in words.
    pub what: &'static str,
    /// Position of the group in the batch.
    pub group: usize,
    /// Position of the response in its group.
    pub response: usize,
    /// Position of the token in its response; none for what a whole response has.
    pub token: Option<usize>,
    /// The number.
    pub value: f64,
}

pub(crate) fn expect_shape(what: &'static str, t: &tch::Tensor, expected: &[i64]) -> Result<(), AlgoError> {
    expect(what, t.size(), expected)
}

pub(crate) fn expect_len(what: &'static str, found: usize, expected: usize) -> Result<(), AlgoError> {
    expect(what, vec![found as i64], &[expected as i64])
}

fn expect(what: &'static str, found: Vec<i64>, expected: &[i64]) -> Result<(), AlgoError> {
    if found == expected { Ok(()) } else { Err(AlgoError::Shape { what, found, expected: expected.to_vec() }) }
}
