//! Waiting by call, over windows, with errors that allow for correlation of neighbouring windows.
//!
//! Over the windows of each user the sum of what is expected equals the sum of what was measured, whatever the number of calls in a window:
//! a window in which no call returned has waiting, too, which least squares would leave out.

use super::DemandWindow;

/// Windows over which errors are correlated.
const LAGS: usize = 4;
/// Below this part of the largest number the equations of the users count as dependent.
const LEAST_PIVOT: f64 = 0.01;

/// The variance of the sum of these numbers, each with the number of its window (Newey and West).
pub fn long_run_sum(all: &[(u64, f64)]) -> f64 {
    let mut sum = 0.0;
    for (n, (number, value)) in all.iter().enumerate() {
        sum += value * value;
        for (later, other) in all.iter().skip(n + 1).take(LAGS) {
            let distance = later - number;
            if distance <= LAGS as u64 {
                sum += 2.0 * (1.0 - distance as f64 / (LAGS as f64 + 1.0)) * value * other;
            }
        }
    }
    sum
}

/// Solves `matrix x = right` for several right sides; `None` if the matrix is singular.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<Vec<f64>>, least_pivot: f64) -> Option<Vec<Vec<f64>>> {
    let n = matrix.len();
    let scale = matrix.iter().flatten().fold(0.0, |most: f64, value| most.max(value.abs()));
    for column in 0..n {
        let pivot = (column..n).max_by(|a, b| matrix[*a][column].abs().total_cmp(&matrix[*b][column].abs()))?;
        if matrix[pivot][column].abs() <= scale * least_pivot {
            return None;
        }
        matrix.swap(column, pivot);
        right.swap(column, pivot);
        let (from, from_right) = (matrix[column].clone(), right[column].clone());
        for row in (0..n).filter(|row| *row != column) {
            let factor = matrix[row][column] / from[column];
            matrix[row].iter_mut().zip(&from).skip(column).for_each(|(to, from)| *to -= factor * from);
            right[row].iter_mut().zip(&from_right).for_each(|(to, from)| *to -= factor * from);
        }
    }
    for (n, row) in right.iter_mut().enumerate() {
        row.iter_mut().for_each(|value| *value /= matrix[n][n]);
    }
    Some(right)
}

pub struct Regression {
    pub coefficients: Vec<f64>,
    /// By coefficient, its standard error.
    pub errors: Vec<f64>,
}

/// The coefficients with which `y` less its expectation sums to 0, over all windows and over those of each user.
pub fn regress(numbers: &[u64], y: &[f64], Rows { x, on }: &Rows) -> Option<Regression> {
    let k = x.first()?.len();
    let mut product = vec![vec![0.0; k]; k];
    for (x, on) in x.iter().zip(on) {
        for (row, left) in product.iter_mut().zip(on) {
            row.iter_mut().zip(x).for_each(|(cell, right)| *cell += left * right);
        }
    }
    let right: Vec<Vec<f64>> = (0..k).map(|row| on.iter().map(|on| on[row]).collect()).collect();
    let weights = solve(product, right, 1e-12)?;
    let coefficients: Vec<f64> =
        weights.iter().map(|weights| weights.iter().zip(y).map(|(weight, y)| weight * y).sum()).collect();
    let residual = |n: usize| y[n] - coefficients.iter().zip(&x[n]).map(|(coefficient, x)| coefficient * x).sum::<f64>();
    let residuals: Vec<f64> = (0..y.len()).map(residual).collect();
    let error = |weights: &Vec<f64>| {
        let all: Vec<(u64, f64)> = numbers
            .iter()
            .zip(weights.iter().zip(&residuals))
            .map(|(number, (weight, residual))| (*number, weight * residual))
            .collect();
        long_run_sum(&all).max(0.0).sqrt()
    };
    let errors = weights.iter().map(error).collect();
    Some(Regression { coefficients, errors })
}

/// The equations, by window.
pub struct Rows {
    /// Its calls, and those with each of the users.
    x: Vec<Vec<f64>>,
    /// 1, and 1 or 0 for each of the users.
    on: Vec<Vec<f64>>,
}

pub fn rows(windows: &[DemandWindow], spans: &[Vec<bool>], users: &[usize]) -> Rows {
    let is_on = |n: usize| std::iter::once(1.0).chain(users.iter().map(move |user| f64::from(u8::from(spans[*user][n]))));
    let on: Vec<Vec<f64>> = (0..windows.len()).map(|n| is_on(n).collect()).collect();
    let with_calls = |(on, window): (&Vec<f64>, &DemandWindow)| on.iter().map(|on| on * window.calls).collect();
    Rows { x: on.iter().zip(windows).map(with_calls).collect(), on }
}

/// Whether the columns of these users can be separated.
pub fn is_solvable(rows: &Rows) -> bool {
    let rows = &rows.x;
    let k = rows.first().map_or(0, Vec::len);
    let norm = |column: usize| rows.iter().map(|row| row[column] * row[column]).sum::<f64>().sqrt();
    let norms: Vec<f64> = (0..k).map(norm).collect();
    if norms.contains(&0.0) {
        return false;
    }
    let product = |i: usize, j: usize| rows.iter().map(|row| row[i] * row[j]).sum::<f64>() / norms[i] / norms[j];
    let matrix = (0..k).map(|i| (0..k).map(|j| product(i, j)).collect()).collect();
    solve(matrix, vec![Vec::new(); k], LEAST_PIVOT).is_some()
}
