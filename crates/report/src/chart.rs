//! Line charts as inline SVG, without scripts: one panel with one or a few series.

use serde::Serialize;

/// A named curve of points `(x, y)`; points that are not finite are left out.
pub(crate) struct Series<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

const COLOURS: [&str; 6] = ["#1f6feb", "#d1495b", "#2a9d8f", "#b8860b", "#7b4fa3", "#555555"];
/// Size of a chart in SVG units.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 220.0;
/// Margins of the plot in SVG units.
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// Values of the chart template: positions in SVG units, formatted numbers.
#[derive(Debug, Serialize)]
pub(crate) struct Panel {
    title: String,
    x_name: &'static str,
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    /// Right end of the y axis labels.
    labels: f64,
    /// Baseline of the x axis labels.
    base: f64,
    middle: f64,
    ticks_y: Vec<TickY>,
    ticks_x: Vec<TickX>,
    curves: Vec<Curve>,
}

#[derive(Debug, Serialize)]
struct TickY {
    at: String,
    below: String,
    text: String,
}

#[derive(Debug, Serialize)]
struct TickX {
    at: String,
    anchor: &'static str,
    text: String,
}

#[derive(Debug, Serialize)]
struct Curve {
    name: String,
    colour: &'static str,
    opacity: f64,
    points: String,
    /// Points of the smoothed curve, if the curve is noisy.
    smooth: Option<String>,
    dots: Vec<[String; 2]>,
}

/// Returns a panel with a title and the given curves; `None` if there are fewer than two points.
pub(crate) fn line_chart(title: &str, x_name: &'static str, series: &[Series<'_>]) -> Option<Panel> {
    let finite = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let all: Vec<(f64, f64)> = series.iter().flat_map(|s| finite(&s.points)).collect();
    if all.len() < 2 {
        return None;
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)))
    };
    let (x0, x1) = range(&mut all.iter().map(|p| p.0));
    let (mut y0, mut y1) = range(&mut all.iter().map(|p| p.1));
    if y1 - y0 < 1e-9 {
        (y0, y1) = (y0 - 0.5, y1 + 0.5);
    }
    let px = |x: f64| LEFT + (x - x0) / (x1 - x0).max(1e-9) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let tick = |k: u8| {
        let y = y0 + (y1 - y0) * f64::from(k) / 4.0;
        TickY { at: format!("{:.1}", py(y)), below: format!("{:.1}", py(y) + 4.0), text: format_number(y) }
    };
    let path = |points: &[(f64, f64)]| {
        points.iter().map(|&(x, y)| format!("{:.1},{:.1}", px(x), py(y))).collect::<Vec<_>>().join(" ")
    };
    let curve = |(s, colour): (&Series<'_>, &&'static str)| {
        let points = finite(&s.points);
        let noisy = points.len() > 40;
        Curve {
            name: s.name.to_owned(),
            colour,
            opacity: if noisy { 0.25 } else { 1.0 },
            points: path(&points),
            smooth: noisy.then(|| path(&smooth(&points))),
            dots: match noisy {
                true => Vec::new(),
                false => points.iter().map(|&(x, y)| [format!("{:.1}", px(x)), format!("{:.1}", py(y))]).collect(),
            },
        }
    };
    let ends = [(x0, "start"), (x1, "end")];
    Some(Panel {
        title: title.to_owned(),
        x_name,
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: WIDTH - RIGHT,
        labels: LEFT - 5.0,
        base: HEIGHT - 9.0,
        middle: (WIDTH + LEFT) / 2.0,
        ticks_y: (0..=4).map(tick).collect(),
        ticks_x: ends.map(|(x, anchor)| TickX { at: format!("{:.1}", px(x)), anchor, text: format_number(x) }).into(),
        curves: series.iter().zip(COLOURS.iter().cycle()).map(curve).collect(),
    })
}

/// Computes the centred moving average over a twentieth of the points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = (points.len() / 40).max(1);
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
            (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

/// Formats a number with at most three decimals or in scientific notation.
fn format_number(v: f64) -> String {
    let text = if v == v.trunc() && v.abs() < 1e6 {
        format!("{v}")
    } else if v.abs() >= 0.01 && v.abs() < 1000.0 {
        format!("{v:.3}")
    } else {
        format!("{v:.1e}")
    };
    if text.contains('.') && !text.contains('e') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_points_are_left_out() {
        let chart = |p: &[(f64, f64)]| line_chart("t", "step", &[Series { name: "a", points: p.to_vec() }]);
        assert!(chart(&[(0.0, 1.0)]).is_none());
        let drawn = chart(&[(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)]).unwrap();
        assert_eq!((drawn.curves[0].dots.len(), drawn.curves[0].points.as_str()), (2, "46.0,194.0 410.0,10.0"));
    }
}
