//! Copies of a rule's requests: the filter RequestMirror, read as a mirror. Where it leads is read as a backend is.

use gateway_api::experimental::httproutes::{
    HttpRouteRulesBackendRefs, HttpRouteRulesFilters, HttpRouteRulesFiltersRequestMirror,
    HttpRouteRulesFiltersType,
};
use penstock_api::resource::WHOLE;
use penstock_api::v1;

use super::filters::{Wrong, same_shape};

/// Whether a filter asks for copies.
pub(super) fn asked(filter: &HttpRouteRulesFilters) -> bool {
    filter.r#type == HttpRouteRulesFiltersType::RequestMirror
}

/// Reads what a filter asks for: the Service, as the reference that backends are read from, and the share.
pub(super) fn read(from: &HttpRouteRulesFilters) -> Result<(HttpRouteRulesBackendRefs, u32), Wrong> {
    let missing = "a filter of type RequestMirror needs the field requestMirror; add it".to_owned();
    let mirror = from.request_mirror.as_ref().ok_or((String::new(), missing))?;
    Ok((same_shape(&mirror.backend_ref)?, share(mirror)?))
}

/// The mirror that was read, where the reference leads.
pub(super) fn to(backend: v1::Backend, share_ppm: u32) -> v1::Mirror {
    let v1::Backend { service, port, invalid, .. } = backend;
    v1::Mirror { service, port, share_ppm, compare: None, invalid }
}

/// Of a million requests, how many are copied; all, unless the filter says otherwise.
fn share(mirror: &HttpRouteRulesFiltersRequestMirror) -> Result<u32, Wrong> {
    let at = |field: &str| format!("/requestMirror/{field}");
    match (mirror.percent, &mirror.fraction) {
        (None, None) => Ok(WHOLE),
        (Some(_), Some(_)) => {
            Err((at("percent"), "percent and fraction say the same; write only one of them".to_owned()))
        }
        (Some(percent), None) => {
            let share = u32::try_from(percent).ok().filter(|percent| *percent <= 100);
            let error = || (at("percent"), format!("{percent} is not a whole number from 0 to 100"));
            share.map(|percent| percent * (WHOLE / 100)).ok_or_else(error)
        }
        (None, Some(fraction)) => {
            let (numerator, denominator) = (fraction.numerator, fraction.denominator.unwrap_or(100));
            if numerator < 0 || denominator < 1 || numerator > denominator {
                let message = format!("{numerator}/{denominator} is no share; write one from 0 to 1");
                return Err((at("fraction"), message));
            }
            let share = i64::from(numerator) * i64::from(WHOLE) / i64::from(denominator);
            // It is no more than the whole.
            Ok(u32::try_from(share).unwrap_or(WHOLE))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(more: &str) -> HttpRouteRulesFilters {
        let yaml =
            format!("{{type: RequestMirror, requestMirror: {{backendRef: {{name: v2, port: 80}}{more}}}}}");
        serde_saphyr::from_str(&yaml).unwrap()
    }

    #[test]
    fn a_share_is_all_or_what_percent_or_fraction_say() {
        let table = [
            ("", WHOLE),
            (", percent: 0", 0),
            (", percent: 42", 420_000),
            (", percent: 100", WHOLE),
            (", fraction: {numerator: 1}", 10_000),
            (", fraction: {numerator: 1, denominator: 3}", 333_333),
            (", fraction: {numerator: 2147483647, denominator: 2147483647}", WHOLE),
        ];
        for (more, expected) in table {
            let (to, share) = read(&filter(more)).unwrap();
            assert_eq!((to.name.as_str(), to.port, share), ("v2", Some(80), expected), "{more}");
        }
    }

    #[test]
    fn what_is_no_share_is_refused_at_its_field() {
        let table = [
            (", percent: 101", "percent", "from 0 to 100"),
            (", percent: -1", "percent", "from 0 to 100"),
            (", percent: 1, fraction: {numerator: 1}", "percent", "only one"),
            (", fraction: {numerator: 2, denominator: 1}", "fraction", "2/1"),
            (", fraction: {numerator: 1, denominator: 0}", "fraction", "1/0"),
            (", fraction: {numerator: -1}", "fraction", "-1/100"),
        ];
        for (more, field, words) in table {
            let (at, error) = read(&filter(more)).unwrap_err();
            assert!(
                at == format!("/requestMirror/{field}") && error.contains(words),
                "{more}: {at}: {error}"
            );
        }
        let nothing = serde_saphyr::from_str("{type: RequestMirror}").unwrap();
        assert!(read(&nothing).unwrap_err().1.contains("needs the field requestMirror"));
    }
}
