//! One-to-one assignment with the largest total weight (Hungarian method, shortest augmenting paths with potentials).
//!
//! Source: Kuhn 1955; the O(rows^2 * columns) form of Jonker and Volgenant 1987. Finds the same optimum as
//! `scipy.optimize.linear_sum_assignment(maximize=True)`.

/// Returns the `min(rows, columns)` pairs `(row, column)` of the assignment with the largest summed weight, ordered by row.
///
/// `weight(row, column)` must be finite. Time is O(a^2 b) for a = min(rows, columns), b = max.
pub fn max_assignment(rows: usize, columns: usize, weight: impl Fn(usize, usize) -> f64) -> Vec<(usize, usize)> {
    if rows > columns {
        let mut pairs: Vec<_> = solve(columns, rows, |r, c| -weight(c, r)).into_iter().map(|(a, b)| (b, a)).collect();
        pairs.sort_unstable();
        return pairs;
    }
    solve(rows, columns, |r, c| -weight(r, c))
}

/// Finds the assignment with the smallest total cost for `rows <= columns`. Index 0 of the work arrays means "none".
fn solve(rows: usize, columns: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<(usize, usize)> {
    let mut row_potential = vec![0.0; rows + 1];
    let mut column_potential = vec![0.0; columns + 1];
    let mut row_of = vec![0_usize; columns + 1];
    let mut back = vec![0_usize; columns + 1];
    for row in 1..=rows {
        row_of[0] = row;
        let mut column = 0;
        let mut least = vec![f64::INFINITY; columns + 1];
        let mut done = vec![false; columns + 1];
        while row_of[column] != 0 {
            done[column] = true;
            let r = row_of[column];
            let mut delta = f64::INFINITY;
            let mut next = 0;
            for c in 1..=columns {
                if done[c] {
                    continue;
                }
                let reduced = cost(r - 1, c - 1) - row_potential[r] - column_potential[c];
                if reduced < least[c] {
                    least[c] = reduced;
                    back[c] = column;
                }
                if least[c] < delta {
                    delta = least[c];
                    next = c;
                }
            }
            for c in 0..=columns {
                if done[c] {
                    row_potential[row_of[c]] += delta;
                    column_potential[c] -= delta;
                } else {
                    least[c] -= delta;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[back[column]];
            column = back[column];
        }
    }
    let mut pairs: Vec<_> = (1..=columns).filter(|&c| row_of[c] != 0).map(|c| (row_of[c] - 1, c - 1)).collect();
    pairs.sort_unstable();
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optimum_beats_the_greedy_choice() {
        let w = [[0.9, 0.8], [0.85, 0.1]];
        assert_eq!(max_assignment(2, 2, |r, c| w[r][c]), vec![(0, 1), (1, 0)]);
    }

    #[test]
    fn tall_wide_and_empty_matrices() {
        let w = [[0.1, 0.5, 0.2]];
        assert_eq!(max_assignment(1, 3, |r, c| w[r][c]), vec![(0, 1)]);
        assert_eq!(max_assignment(3, 1, |r, c| w[c][r]), vec![(1, 0)]);
        assert!(max_assignment(0, 3, |_, _| 0.0).is_empty());
    }
}
