//! Waiting by call, over windows, with errors that allow for correlation of neighbouring windows.
//!
//! Over the windows of each user the sum of what is expected equals the sum of what was measured, whatever the number of calls in a window:
//! a window in which no call returned has waiting, too, which least squares would leave out.

use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::{DemandWindow, LEVEL};

/// Windows over which errors are correlated.
const LAGS: usize = 4;
/// Below this part of the largest number the equations of the users count as dependent.
const LEAST_PIVOT: f64 = 0.01;
/// The same for the equations without a span.
const LEAST_PIVOT_OF_PART: f64 = 1e-6;
/// Windows that may be missing within a span.
const LONGEST_GAP: u64 = 3;
/// Parts of which each is left out once: a long session has more spans, of which several are one part then.
const MOST_PARTS: usize = 200;
/// Parts beyond the number of coefficients, for an interval.
const LEAST_FREEDOM: usize = 2;

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
    /// By coefficient, its standard error, from the scatter of the windows around the equations.
    pub errors: Vec<f64>,
    /// By coefficient, half of its interval, from what it becomes without each span of windows with the same users on (jackknife). It is
    /// wider where what a user causes depends on who else is on, which the equations do not have. `None` if a span cannot be left out.
    pub halves: Vec<Option<f64>>,
}

/// The sums of the equations over some windows: their matrix, and their right side.
struct Sums {
    matrix: Vec<Vec<f64>>,
    right: Vec<f64>,
}

impl Sums {
    fn new(k: usize) -> Self {
        Self { matrix: vec![vec![0.0; k]; k], right: vec![0.0; k] }
    }

    fn of(parts: &[Self], k: usize) -> Self {
        let mut all = Self::new(k);
        for part in parts {
            for (to, from) in all.matrix.iter_mut().zip(&part.matrix) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
            all.right.iter_mut().zip(&part.right).for_each(|(to, from)| *to += from);
        }
        all
    }

    fn add(&mut self, x: &[f64], on: &[f64], y: f64) {
        for ((row, right), on) in self.matrix.iter_mut().zip(&mut self.right).zip(on) {
            row.iter_mut().zip(x).for_each(|(cell, x)| *cell += on * x);
            *right += on * y;
        }
    }

    /// The coefficients without a part of the windows.
    fn solve_without(&self, part: &Self) -> Option<Vec<f64>> {
        let less = |(all, part): (&Vec<f64>, &Vec<f64>)| all.iter().zip(part).map(|(all, part)| all - part).collect();
        let matrix = self.matrix.iter().zip(&part.matrix).map(less).collect();
        let right = self.right.iter().zip(&part.right).map(|(all, part)| vec![all - part]).collect();
        Some(solve(matrix, right, LEAST_PIVOT_OF_PART)?.into_iter().flatten().collect())
    }
}

/// The spans of consecutive windows with the same users on, as sums of the equations.
fn spans(numbers: &[u64], y: &[f64], Rows { x, on }: &Rows) -> Vec<Sums> {
    let mut spans: Vec<Sums> = Vec::new();
    for n in 0..y.len() {
        let is_next = n > 0 && on[n] == on[n - 1] && numbers[n] <= numbers[n - 1] + LONGEST_GAP;
        if !is_next {
            spans.push(Sums::new(on[n].len()));
        }
        if let Some(span) = spans.last_mut() {
            span.add(&x[n], &on[n], y[n]);
        }
    }
    spans
}

/// See [`Regression::halves`].
fn halves(spans: &[Sums], all: &Sums, coefficients: &[f64]) -> Vec<Option<f64>> {
    let k = coefficients.len();
    let parts: Vec<Sums> = spans.chunks(spans.len().div_ceil(MOST_PARTS).max(1)).map(|spans| Sums::of(spans, k)).collect();
    let n = parts.len() as f64;
    let without: Option<Vec<Vec<f64>>> = parts.iter().map(|part| all.solve_without(part)).collect();
    let student = StudentsT::new(0.0, 1.0, n - k as f64).ok().filter(|_| parts.len() >= k + LEAST_FREEDOM);
    let (Some(without), Some(student)) = (without, student) else { return vec![None; k] };
    let half = |of: usize| {
        let squares: f64 = without.iter().map(|less| (less[of] - coefficients[of]).powi(2)).sum();
        student.inverse_cdf((1.0 + LEVEL) / 2.0) * ((n - 1.0) / n * squares).sqrt()
    };
    (0..k).map(|of| Some(half(of))).collect()
}

/// The coefficients with which `y` less its expectation sums to 0, over all windows and over those of each user.
pub fn regress(numbers: &[u64], y: &[f64], rows: &Rows) -> Option<Regression> {
    let Rows { x, on } = rows;
    let k = x.first()?.len();
    let spans = spans(numbers, y, rows);
    let all = Sums::of(&spans, k);
    let right: Vec<Vec<f64>> = (0..k).map(|row| on.iter().map(|on| on[row]).collect()).collect();
    let weights = solve(all.matrix.clone(), right, 1e-12)?;
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
    let halves = halves(&spans, &all, &coefficients);
    Some(Regression { coefficients, errors, halves })
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
