//! Numbers as people read them: grouped digits, units, one width of precision.

/// `12,345`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A share in 0..=1 as `12.3 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Milliseconds, in three digits or so: `0.42 ms`, `12.3 ms`, `123 ms`, `12.3 s`.
pub(crate) fn milliseconds(ms: f64) -> String {
    match ms {
        _ if ms < 10.0 => format!("{ms:.2} ms"),
        _ if ms < 100.0 => format!("{ms:.1} ms"),
        _ if ms < 10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}

/// `1,234/s`, and `0.4/s` where whole numbers would say nothing.
pub(crate) fn per_second(rate: f64) -> String {
    if rate < 10.0 { format!("{rate:.1}/s") } else { format!("{}/s", count(rate.round() as u64)) }
}

/// `512 B`, `6.0 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Whole seconds as the two largest units: `42s`, `3m 20s`, `2h 5m`, `12d 3h`.
pub(crate) fn age(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// How long ago something was: `12 ms ago`, `1.5 s ago`, `3m 20s ago`.
pub(crate) fn ago(ms: f64) -> String {
    match ms {
        _ if ms < 1000.0 => format!("{ms:.0} ms ago"),
        _ if ms < 60_000.0 => format!("{:.1} s ago", ms / 1000.0),
        _ => format!("{} ago", age(ms / 1000.0)),
    }
}

/// Something that may not be known: `–`.
pub(crate) fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), show)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_groups_and_units() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.0, 0.1234, 1.0].map(percent), ["0.0 %", "12.3 %", "100.0 %"]);
        assert_eq!(
            [0.417, 12.34, 123.4, 12_340.0].map(milliseconds),
            ["0.42 ms", "12.3 ms", "123 ms", "12.3 s"]
        );
        assert_eq!([0.44, 9.96, 1234.4].map(per_second), ["0.4/s", "10.0/s", "1,234/s"]);
        assert_eq!([512, 6 << 20, 3 << 40].map(bytes), ["512 B", "6.0 MiB", "3.0 TiB"]);
        assert_eq!([42.9, 200.0, 7500.0, 1_047_600.0].map(age), ["42s", "3m 20s", "2h 5m", "12d 3h"]);
        assert_eq!([12.4, 9999.0, 200_000.0].map(ago), ["12 ms ago", "10.0 s ago", "3m 20s ago"]);
        assert_eq!(or_dash(None, count), "–");
    }
}
