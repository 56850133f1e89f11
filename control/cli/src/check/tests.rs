//! What checks say of given facts.

use super::*;

fn certificate(role: &str, serial: &str, not_before: i64, not_after: i64) -> Certificate {
    Certificate {
        name: "x".to_owned(),
        serial: serial.to_owned(),
        not_before,
        not_after,
        role: role.to_owned(),
    }
}

fn holder(node: &str, certificates: Vec<Certificate>) -> ProxyCertificates {
    ProxyCertificates { node: node.to_owned(), certificates, error: None }
}

fn verdicts(checks: &[Check]) -> Vec<(&'static str, Verdict)> {
    checks.iter().map(|check| (check.name, check.verdict)).collect()
}

#[test]
fn a_certificate_that_nobody_renewed_is_a_problem_before_it_ends() {
    let anchor = certificate("anchor", "1", 0, 400 * 86_400);
    let fresh = holder("a/one", vec![certificate("leaf", "2", 0, 1000), anchor.clone()]);
    let checks = certified(std::slice::from_ref(&fresh), 500.0);
    assert_eq!(verdicts(&checks), [("certificates", Verdict::Ok), ("trust anchors", Verdict::Ok)]);
    assert_eq!(checks[0].found, "1 held; the next to end is that of a/one, 8m 20s of 16m 40s left");
    assert_eq!(checks[1].found, "1 trusted; the first to end: 399d 23h of 400d 0h left");

    let checks = certified(&[fresh, holder("a/two", vec![anchor])], 800.0);
    assert_eq!(verdicts(&checks), [("certificates", Verdict::Problem), ("trust anchors", Verdict::Ok)]);
    assert_eq!(checks[0].details, ["a/one: 3m 20s of 16m 40s left"]);
}

#[test]
fn an_anchor_that_ends_soon_is_told_once_and_with_the_command() {
    let day = 86_400;
    let anchor = certificate("anchor", "1", -364 * day, day);
    let checks = certified(&[holder("a/one", vec![anchor.clone()]), holder("a/two", vec![anchor])], 0.0);
    assert_eq!(verdicts(&checks), [("trust anchors", Verdict::Warning)]);
    assert_eq!(checks[0].details, ["anchor x: 1d 0h of 365d 0h left"]);
    assert!(checks[0].fix.contains("rotate-root"));
}

#[test]
fn seconds_are_plenty_for_a_certificate_that_lives_for_a_minute() {
    let leaf = certificate("leaf", "2", -4, 40);
    let short_anchor = certificate("anchor", "1", -300, 300);
    let checks = certified(&[holder("a/one", vec![leaf, short_anchor])], 20.0);
    assert_eq!(verdicts(&checks), [("certificates", Verdict::Ok), ("trust anchors", Verdict::Ok)]);
    assert_eq!(checks[0].found, "1 held; the next to end is that of a/one, 20s of 44s left");
}

#[test]
fn a_service_without_ready_endpoints_is_a_problem_and_an_ejection_a_warning() {
    let endpoint = |service: &str, name: &str, state: &str| EndpointRow {
        service: service.to_owned(),
        endpoint: name.to_owned(),
        state: state.to_owned(),
        ..EndpointRow::default()
    };
    let mut rows = vec![endpoint("a/s", "a/1", "ready"), endpoint("a/s", "a/2", "ready")];
    assert_eq!(ready(&rows).found, "2 ready in 1 Service");
    rows[0].state = "ejected".to_owned();
    assert_eq!(ready(&rows).verdict, Verdict::Warning);
    rows[1].state = "draining".to_owned();
    assert_eq!(ready(&rows).details, ["a/s: 0 of 2 ready"]);
    assert_eq!(ready(&rows).verdict, Verdict::Problem);
}

#[test]
fn the_page_is_a_list_with_what_to_do() {
    let problem = Problem {
        file: "a.yaml".to_owned(),
        line: 3,
        object: "Service a/s".to_owned(),
        message: "weights sum to 0".to_owned(),
        last_good_in_force: false,
    };
    let checks = [Check::ok("control", "answers"), objects(&[problem], "Correct it.")];
    assert_eq!(
        page(&checks, Terminal::PLAIN),
        "✔ control  answers\n\
         ✖ objects  1 object is wrong\n    \
         a.yaml:3: Service a/s: weights sum to 0\n    \
         → Correct it.\n"
    );
    let json = serde_json::to_value(&checks).unwrap();
    assert_eq!(json[1]["verdict"], "problem");
}

#[test]
fn the_examples_in_the_repository_pass() {
    for example in ["digits", "gpu"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/examples").join(example);
        let checks = of_directory(&path).unwrap();
        let page = page(&checks, Terminal::PLAIN);
        assert_eq!(verdicts(&checks), [("objects", Verdict::Ok)], "{example}: {page}");
    }
}

#[test]
fn nonsense_in_a_directory_is_named_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let yaml = "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  namespace: a\n  annotations:\n    \
                penstock.io/traffic-split: \"nobody=0\"\nspec:\n  ports:\n    - {port: 80}\n";
    std::fs::write(directory.path().join("s.yaml"), yaml).unwrap();
    let checks = of_directory(directory.path()).unwrap();
    assert_eq!(verdicts(&checks), [("objects", Verdict::Problem)]);
    assert!(checks[0].details[0].contains("s.yaml:"), "{:?}", checks[0].details);
    assert!(matches!(of_directory(&directory.path().join("no")), Err(Failure::Usage(_))));
}
