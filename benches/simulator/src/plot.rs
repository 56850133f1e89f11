//! Plots as SVG: latency over the quantile, for the subjects of one case.

use std::fmt::Write;

use crate::cases::Case;
use crate::report::{Results, spread};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 600.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 372.0;

/// Subjects that are drawn, with their colours.
const LINES: [(&str, &str, f64); 10] = [
    ("penstock", "#0b6e4f", 3.0),
    ("oracle", "#111111", 1.5),
    ("least-request", "#c1121f", 1.8),
    ("peak-ewma", "#e07a1f", 1.5),
    ("orca-wrr", "#8d5a97", 1.5),
    ("prequal", "#2a6fdb", 1.8),
    ("round-robin", "#9aa0a6", 1.3),
    ("epp", "#3aa6b9", 1.5),
    ("sglang", "#d4a017", 1.8),
    ("sglang-library", "#b08968", 1.3),
];

/// The quantiles that are marked.
const MARKS: [(f64, &str); 6] =
    [(0.0, "0"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9995, "")];

/// The plot of a case: the median over the seeds at each quantile, both axes logarithmic.
pub fn curve(case: &Case, results: &Results) -> String {
    let lines: Vec<_> = LINES
        .iter()
        .filter_map(|(subject, colour, width)| {
            let figures = results.get(subject)?;
            let points: Vec<(f64, f64)> = (0..figures.first()?.curve.len())
                .map(|i| (figures[0].curve[i].0, spread(figures.iter().map(|f| f.curve[i].1).collect()).0))
                .filter(|(_, ms)| ms.is_finite() && *ms > 0.0)
                .collect();
            Some((*subject, *colour, *width, points))
        })
        .collect();
    let all = || lines.iter().flat_map(|line| line.3.iter().map(|point| point.1));
    let low = all().fold(f64::INFINITY, f64::min).log10().floor();
    let high = all().fold(1.0, f64::max).log10().ceil().max(low + 1.0);
    let x = |quantile: f64| LEFT + (RIGHT - LEFT) * -(1.0 - quantile).log10() / -(1.0f64 - 0.9995).log10();
    let y = |ms: f64| BOTTOM - (BOTTOM - TOP) * (ms.log10() - low) / (high - low);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{} (simulated GPUs)</text>\n\
         <text x=\"{LEFT}\" y=\"37\" fill=\"#555\">{}; milliseconds to the {} by quantile</text>\n",
        case.name,
        case.about,
        if case.is_chat() { "first token" } else { "answer" },
    );
    for decade in low as i32..=high as i32 {
        let (ms, at) = (10f64.powi(decade), y(10f64.powi(decade)));
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>"
        );
        let _ =
            writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{ms}</text>", LEFT - 6.0, at + 4.0);
    }
    for (quantile, name) in MARKS {
        let at = x(quantile);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\" stroke=\"#eee\"/>"
        );
        let _ =
            writeln!(svg, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>", BOTTOM + 16.0);
    }
    for (i, (subject, colour, width, points)) in lines.iter().enumerate() {
        let path: Vec<String> =
            points.iter().map(|(quantile, ms)| format!("{:.1},{:.1}", x(*quantile), y(*ms))).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>",
            path.join(" ")
        );
        let at = TOP + 12.0 + 18.0 * i as f64;
        let from = RIGHT + 14.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{from}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>\
             <text x=\"{}\" y=\"{}\">{subject}</text>",
            from + 20.0,
            from + 26.0,
            at + 4.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}
