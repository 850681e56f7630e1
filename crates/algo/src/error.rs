//! Errors in the inputs of an advantage or a loss.

/// Errors of advantages and losses: inputs that do not match each other, or values that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AlgoError {
    /// A tensor or series does not have the shape that the batch needs.
    #[error("`{what}` has shape {found:?} where {expected:?} is needed")]
    Shape {
        /// Name of the tensor or series.
        what: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The shape that is needed.
        expected: Vec<i64>,
    },
    /// A term needs an input that is not given.
    #[error("the {term} term has a weight but `{input}` was not given")]
    Missing {
        /// Name of the term.
        term: &'static str,
        /// Name of the input.
        input: &'static str,
    },
    /// No term of the objective has a weight above 0.
    #[error("no term of the objective has a weight: there is nothing to differentiate")]
    Empty,
    /// A value is not finite.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Torch(#[from] tch::TchError),
}

/// A value that is NaN or infinite, and its position, counted from 0.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the {what} of {}response {response} of group {group} is {value}: leave the group out, or find out where it comes from", .token.map_or_else(String::new, |t| format!("token {t} of ")))]
pub struct NotFinite {
    /// Name of the value, in words.
    pub what: &'static str,
    /// Position of the group in the batch.
    pub group: usize,
    /// Position of the response in its group.
    pub response: usize,
    /// Position of the token in its response; `None` for a value of the whole response.
    pub token: Option<usize>,
    /// The value.
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
