//! Line charts as inline SVG: one panel, one or a few series, no script needed.

/// One curve: points `(x, y)`; points that are not finite are left out.
pub(crate) struct Series<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

const COLOURS: [&str; 6] = ["#1f6feb", "#d1495b", "#2a9d8f", "#b8860b", "#7b4fa3", "#555555"];
const W: f64 = 420.0;
const H: f64 = 220.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// A panel with a title and the given curves; empty when there is nothing to draw.
pub(crate) fn panel(title: &str, x_name: &str, series: &[Series<'_>]) -> String {
    let all: Vec<(f64, f64)> =
        series.iter().flat_map(|s| &s.points).copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    if all.len() < 2 {
        return String::new();
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)))
    };
    let (x0, x1) = range(&mut all.iter().map(|p| p.0));
    let (mut y0, mut y1) = range(&mut all.iter().map(|p| p.1));
    if y1 - y0 < 1e-9 {
        (y0, y1) = (y0 - 0.5, y1 + 0.5);
    }
    let px = |x: f64| LEFT + (x - x0) / (x1 - x0).max(1e-9) * (W - LEFT - RIGHT);
    let py = |y: f64| H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM);
    let mut out = format!("<figure><figcaption>{title}</figcaption><svg viewBox=\"0 0 {W} {H}\" role=\"img\">");
    for k in 0..=4 {
        let y = y0 + (y1 - y0) * f64::from(k) / 4.0;
        out += &format!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\" class=\"grid\"/><text x=\"{2}\" y=\"{3:.1}\" class=\"y\">{4}</text>",
            W - RIGHT,
            py(y),
            LEFT - 5.0,
            py(y) + 4.0,
            short(y)
        );
    }
    for (x, anchor) in [(x0, "start"), (x1, "end")] {
        out += &format!("<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>", px(x), H - 9.0, short(x));
    }
    out += &format!("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{x_name}</text>", (W + LEFT) / 2.0, H - 9.0);
    for (s, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<(f64, f64)> =
            s.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
        let noisy = points.len() > 40;
        let path = |pts: &[(f64, f64)]| {
            pts.iter().map(|&(x, y)| format!("{:.1},{:.1}", px(x), py(y))).collect::<Vec<_>>().join(" ")
        };
        out += &format!(
            "<polyline points=\"{}\" stroke=\"{colour}\" opacity=\"{}\"/>",
            path(&points),
            if noisy { 0.25 } else { 1.0 }
        );
        if noisy {
            out += &format!("<polyline points=\"{}\" stroke=\"{colour}\"/>", path(&smooth(&points)));
        } else {
            for &(x, y) in &points {
                out += &format!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>", px(x), py(y));
            }
        }
    }
    out += "</svg>";
    if series.len() > 1 {
        out += "<div class=\"legend\">";
        for (s, colour) in series.iter().zip(COLOURS.iter().cycle()) {
            out += &format!("<span><i style=\"background:{colour}\"></i>{}</span>", s.name);
        }
        out += "</div>";
    }
    out + "</figure>"
}

/// Centred moving average over a twentieth of the points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = (points.len() / 40).max(1);
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
            (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

fn short(v: f64) -> String {
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
    fn draws_only_what_is_finite() {
        let s = |p: &[(f64, f64)]| panel("t", "step", &[Series { name: "a", points: p.to_vec() }]);
        assert!(s(&[(0.0, 1.0)]).is_empty());
        let svg = s(&[(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)]);
        assert!(svg.contains("polyline") && !svg.contains("NaN"));
    }
}
