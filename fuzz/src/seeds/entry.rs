//! Those of what clients, control and operators say: one of each form, and of each way in which others were led astray by it.

use penstock_api::annotation::ALL;
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::v1::access_policy::Effect;
use prost::Message as _;

/// Puts them all.
pub fn all(mut put: impl FnMut(&'static str, &str, &[u8], &[u8])) {
    for (name, bytes) in FIRST {
        put("first_bytes", name, &[], bytes);
    }
    put("first_bytes", "client-hello", &[], &hello("port-8000.mesh.penstock.io"));
    put("first_bytes", "client-hello-of-a-stranger", &[], &hello("www.example.com"));
    for (name, bytes) in HTTP1 {
        put("http1_entry", name, &[7], bytes.as_bytes());
    }
    for (name, times, frames) in http2() {
        put("http2_entry", name, &[7, times], &frames.concat());
    }
    let mut whole = Vec::new();
    for (name, responses) in responses() {
        let bytes = responses.concat();
        put("xds_resources", name, &[], &bytes);
        whole.extend(bytes);
    }
    put("xds_resources", "all", &[], &whole);
    let pods = ALL.iter().filter_map(|row| Some((row.name.strip_prefix("penstock.io/")?, row.examples)));
    for (name, examples) in pods {
        let lines: Vec<String> = examples.iter().map(|example| format!("{name}:{example}\n")).collect();
        put("annotations", name, &[], lines.concat().as_bytes());
    }
    put("annotations", "wrong", &[], WRONG.as_bytes());
    for (name, text) in YAML {
        put("yaml", name, &[], text.as_bytes());
    }
    for (name, text) in BOMBS {
        let line = |at: usize| text.replace("@", &at.to_string()).replace("#", &(at - 1).to_string());
        put(
            "yaml",
            name,
            &[],
            ("a0: &a0 [x, x, x, x, x, x, x, x]\n".to_owned() + &(1..12).map(line).collect::<String>())
                .as_bytes(),
        );
    }
    let anchors = (0..200).map(|at| format!("- &b{at} x\n")).collect::<String>();
    let again = format!("- &a {}\n{anchors}{}", "long".repeat(2_000), "- *a\n".repeat(1_900));
    put("yaml", "a-long-word-again-and-again", &[], again.as_bytes());
    for (at, path) in PATHS.iter().enumerate() {
        put("path", &format!("{at:02}"), &[], path.as_bytes());
    }
    for (at, policies) in policies().iter().enumerate() {
        let message =
            v1::Access { policies: policies.clone(), limits: vec![limit()], ..v1::Access::default() };
        put("access", &format!("{at}"), &[at as u8 * 37], &message.encode_to_vec());
    }
}

const FIRST: [(&str, &[u8]); 8] = [
    ("http1", b"GET /v2/models/m HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
    ("almost-http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r"),
    ("method-pri", b"PRI /x HTTP/1.1\r\n"),
    ("long-method", b"MKWORKSPACECONTROLLEDDIRECTORY / HTTP/1.1\r\n"),
    ("lower-case", b"get / HTTP/1.1\r\n"),
    ("ssh", b"SSH-2.0-OpenSSH_9.6\r\n"),
    ("mysql", b"J\0\0\0\x0a8.0.36\0"),
];

/// A ClientHello of TLS 1.3 that names a host (RFC 8446, 4.1.2).
fn hello(sni: &str) -> Vec<u8> {
    fn with_length<const BYTES: usize>(body: &[u8]) -> Vec<u8> {
        [&body.len().to_be_bytes()[8 - BYTES..], body].concat()
    }
    let extension = |kind: u16, body: &[u8]| [&kind.to_be_bytes()[..], &with_length::<2>(body)].concat();
    let name = with_length::<2>(&[&[0][..], &with_length::<2>(sni.as_bytes())].concat());
    let key = [&[0, 0x1d][..], &with_length::<2>(&[9; 32])].concat();
    let extensions = [
        extension(0, &name),
        extension(10, &with_length::<2>(&[0, 0x1d])),
        extension(13, &with_length::<2>(&[4, 3, 8, 4])),
        extension(16, &with_length::<2>(&with_length::<1>(b"penstock-h2"))),
        extension(43, &with_length::<1>(&[3, 4])),
        extension(51, &with_length::<2>(&key)),
    ];
    let begin = [&[3, 3][..], &[5; 32], &with_length::<1>(&[]), &with_length::<2>(&[0x13, 1]), &[1, 0]];
    let body = [begin.concat(), with_length::<2>(&extensions.concat())].concat();
    let handshake = [&[1][..], &with_length::<3>(&body)].concat();
    [&[0x16, 3, 1][..], &with_length::<2>(&handshake)].concat()
}

const HTTP1: [(&str, &str); 36] = [
    ("get", "GET /a?b=c HTTP/1.1\r\nHost: a\r\n\r\n"),
    (
        "pipelined",
        "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\nHEAD /3 HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "post",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhelloGET /next HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    ("half", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\nhello"),
    (
        "chunks",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "trailers",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;x=\"y\"\r\nz\r\n0\r\ncontent-length: 9\r\nhost: b\r\nx-sum: 1\r\n\r\n",
    ),
    (
        "chunk-of-any-size",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\nx\r\n0\r\n\r\n",
    ),
    (
        "chunk-with-a-bare-lf",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\nGE\n0\r\n\r\n",
    ),
    (
        "tensors",
        concat!(
            "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\ncontent-length: 68\r\n\r\n",
            "{}GET /forged HTTP/1.1\r\nhost: a\r\n\r\nGET /forged HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET /next HTTP/1.1\r\nhost: a\r\n\r\n"
        ),
    ),
    (
        "tensors-twice",
        concat!(
            "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\ncontent-length: 0000064\r\n\r\n",
            "{}bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
            "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\ncontent-length: 64\r\n\r\n",
            "{}bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
        ),
    ),
    (
        "tensors-in-chunks",
        "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "length-before-chunks",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "chunks-before-length",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n1c\r\nGET /forged HTTP/1.1\r\nx: y\r\n\r\n0\r\n\r\n",
    ),
    (
        "two-lengths",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 0\r\n\r\nhelloGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "one-length-twice",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    ("lengths-in-a-list", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 5\r\n\r\nhello"),
    ("length-with-a-sign", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello"),
    ("length-of-any-size", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551617\r\n\r\nh"),
    ("blank-before-colon", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length : 5\r\n\r\nhello"),
    (
        "chunked-disguised",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\u{b}chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    ),
    ("chunked-twice", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    (
        "coded-otherwise",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("identity", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\ncontent-length: 1\r\n\r\nx"),
    (
        "chunks-in-http-1.0",
        "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n0\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    ),
    (
        "http-1.0",
        "GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\nGET /2 HTTP/1.0\r\n\r\nGET /3 HTTP/1.0\r\n\r\n",
    ),
    (
        "premature-upgrade",
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET /forged HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "h2c",
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    ("connect", "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("two-hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
    (
        "a-user-in-the-host",
        "GET / HTTP/1.1\r\nhost: u@a:x\r\n\r\nGET http://u:p@[::1]:80/ HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    (
        "absolute",
        "GET http://b/x HTTP/1.1\r\nhost: a\r\n\r\nOPTIONS * HTTP/1.1\r\nhost: a\r\n\r\nGET * HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
    ("expect", "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nhi"),
    ("folded", "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n"),
    ("bare-lf", "\n\nGET / HTTP/1.1\nhost: a\n\nGET / HTTP/1.1\nhost: a\n\n"),
    ("bare-cr", "GET / HTTP/1.1\rhost: a\r\nx: a\rb\r\n\r\n"),
    (
        "named-by-connection",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: content-length, close\r\ncontent-length: 2\r\n\r\nhiGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ),
];

/// `GET`, and `POST`, of `http://a/` (RFC 7541, appendix A).
const GET: &[u8] = &[0x82, 0x84, 0x86, 0x41, 1, b'a'];
const POST: &[u8] = &[0x83, 0x84, 0x86, 0x41, 1, b'a'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Frames, and how often they come besides once.
fn http2() -> Vec<(&'static str, u8, Vec<Vec<u8>>)> {
    let settings = || frame(4, 0, 0, &[]);
    let reset = |stream| frame(3, 0, stream, &[0, 0, 0, 8]);
    let rapid = (0..1_100).flat_map(|at| [frame(1, 5, 2 * at + 1, GET), reset(2 * at + 1)]);
    let cookie = [GET, &[0x60, 3, b'a', b'=', b'b', 0xbe, 0xbe, 0xbe, 0xbe]].concat();
    let mut begun = frame(1, 1, 1, GET);
    let rest = begun.split_off(12);
    begun[2] = 3;
    vec![
        ("get", 0, vec![settings(), frame(1, 5, 1, GET), frame(4, 1, 0, &[])]),
        ("post", 0, vec![settings(), frame(1, 4, 1, POST), frame(0, 0, 1, b"he"), frame(0, 1, 1, b"llo")]),
        ("trailers", 0, vec![settings(), frame(1, 4, 1, POST), frame(1, 5, 1, &[0, 1, b'x', 1, b'y'])]),
        (
            "trailers-without-end",
            0,
            vec![settings(), frame(1, 4, 1, POST), frame(1, 4, 1, &[0, 1, b'x', 1, b'y'])],
        ),
        ("in-two-blocks", 0, vec![settings(), begun, frame(9, 4, 1, &rest)]),
        ("continuation-without-end", 255, vec![settings(), frame(1, 1, 1, GET), frame(9, 0, 1, &[])]),
        ("pings", 255, vec![settings(), frame(6, 0, 0, &[7; 8]).repeat(42)]),
        ("settings", 255, vec![settings().repeat(42)]),
        ("settings-of-one-thing", 255, vec![frame(4, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]).repeat(8)]),
        ("empty-data", 255, vec![frame(1, 4, 1, POST), frame(0, 0, 1, &[]).repeat(42)]),
        ("priorities", 255, vec![frame(2, 0, 3, &[0, 0, 0, 0, 1]).repeat(42)]),
        ("windows", 255, vec![frame(8, 0, 0, &[0, 0, 0, 1]).repeat(42)]),
        ("of-no-kind", 255, vec![frame(0xfa, 0xff, 0, b"grease").repeat(42)]),
        ("reset-as-soon-as-begun", 0, rapid.collect()),
        ("made-to-reset", 9, vec![frame(1, 5, 1, GET), frame(8, 0, 1, &[0, 0, 0, 0])]),
        ("cookies", 0, vec![settings(), frame(1, 5, 1, &cookie)]),
        ("table-of-headers", 0, vec![settings(), frame(1, 5, 1, &[&[0x3f, 0xe1, 0x1f], GET].concat())]),
        ("goaway", 0, vec![settings(), frame(7, 0, 0, &[0; 8]), frame(1, 5, 1, GET)]),
        ("padded", 0, vec![settings(), frame(1, 4, 1, POST), frame(0, 9, 1, &[3, b'x', 0, 0, 0])]),
    ]
}

/// One response: see `xds_resources`.
fn response(kind: Kind, form: u8, bytes: &[u8]) -> Vec<u8> {
    let at = Kind::PUSH_ORDER.iter().position(|known| *known == kind).unwrap_or_default();
    let [low, high] = (bytes.len() as u16).to_le_bytes();
    [&[at as u8, form, low, high][..], bytes].concat()
}

fn responses() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let path = v1::StringMatch { kind: Some(v1::string_match::Kind::Prefix("/v2".into())) };
    let team = v1::NamedMatch {
        name: "x-team".into(),
        value: Some(v1::StringMatch { kind: Some(v1::string_match::Kind::Regex("a|b+".into())) }),
    };
    let set = v1::Header { name: "x-set".into(), value: "1".into() };
    let change = |name: &str| v1::HeaderChange {
        set: vec![v1::Header { name: name.into(), ..set.clone() }],
        ..v1::HeaderChange::default()
    };
    let filter = |name: &str| v1::Filter { kind: Some(v1::filter::Kind::RequestHeaders(change(name))) };
    let rule = |filters: Vec<v1::Filter>| v1::Rule {
        route: "route".into(),
        matches: vec![v1::Match {
            path: Some(path.clone()),
            headers: vec![team.clone()],
            ..v1::Match::default()
        }],
        filters,
        weights: "team-a/resnet/route/0".into(),
        hostnames: vec!["*.team-a".into()],
        ..v1::Rule::default()
    };
    let routes =
        |filters| response(Kind::Routes, 2, &v1::Routes { rules: vec![rule(filters)] }.encode_to_vec());
    let backend =
        v1::Backend { service: "team-a/llama".into(), port: 80, weight: 90, ..v1::Backend::default() };
    let weights = v1::Weights { route: "route".into(), backends: vec![backend], ..v1::Weights::default() };
    let port = v1::ServicePort { port: 80, name: "http".into(), ..v1::ServicePort::default() };
    let service = v1::Service {
        namespace: "team-a".into(),
        name: "resnet".into(),
        ports: vec![port],
        ..v1::Service::default()
    };
    let target = v1::PortTarget { service_port: 80, port: 8000, ..v1::PortTarget::default() };
    let endpoint = v1::Endpoint {
        name: "pod".into(),
        ip: "10.0.0.2".into(),
        ports: vec![target],
        identity: "spiffe://cluster.local/ns/team-a/sa/resnet".into(),
        inbound_port: 15_006,
        ..v1::Endpoint::default()
    };
    let endpoints = v1::Endpoints { endpoints: vec![endpoint] };
    let workload = v1::Workload {
        namespace: "team-a".into(),
        name: "client".into(),
        ports: vec![v1::WorkloadPort {
            port: 8000,
            application: "127.0.0.1:8000".into(),
            ..Default::default()
        }],
        probes: vec![v1::Probe { port: 9000, path: "/live".into(), application: "127.0.0.1:9000".into() }],
        admission: Some(v1::Admission { limit: 8, queue: 16 }),
        ..v1::Workload::default()
    };
    let access = v1::Access { policies: policies().concat(), limits: vec![limit()], ..v1::Access::default() };
    let newer = v1::Access { level: 99, ..access.clone() };
    let workload = workload.encode_to_vec();
    let declaration = br#"{"input":{"format":"image"},"resize":{"mode":"exact","width":8,"height":8},"layout":"nchw","dtype":"f32"}"#;
    vec![
        (
            "service",
            vec![
                response(Kind::Service, 2, &service.encode_to_vec()),
                response(Kind::Endpoints, 2, &endpoints.encode_to_vec()),
                routes(vec![filter("x-set")]),
                response(Kind::Weights, 0x85, &weights.encode_to_vec()),
            ],
        ),
        (
            "filter-of-the-future",
            vec![routes(vec![]), routes(vec![v1::Filter::default()]), routes(vec![filter("host")])],
        ),
        ("workload", vec![response(Kind::Workload, 0, &workload), response(Kind::Workload, 8, &[])]),
        ("access", vec![response(Kind::Access, 0, &access.encode_to_vec())]),
        ("access-of-the-future", vec![response(Kind::Access, 0, &newer.encode_to_vec())]),
        ("pipeline", vec![response(Kind::Workload, 0x40, &[&[8][..], declaration].concat())]),
        (
            "another-type",
            vec![response(Kind::Workload, 0x10, &workload), response(Kind::Workload, 0x20, &workload)],
        ),
        (
            "address",
            vec![
                response(Kind::Address, 4, &v1::Address::default().encode_to_vec()),
                response(Kind::Address, 12, &[]),
            ],
        ),
        ("cut-off", vec![response(Kind::Workload, 0, &workload[..workload.len() - 3])]),
    ]
}

fn policies() -> [Vec<v1::AccessPolicy>; 4] {
    let from = v1::AccessFrom {
        identities: vec!["spiffe://cluster.local/ns/team-a/*".into()],
        not_namespaces: vec!["jobs".into()],
        ..v1::AccessFrom::default()
    };
    let to = v1::AccessTo {
        methods: vec!["GET".into(), "POST".into()],
        paths: vec!["/v2/*".into()],
        models: vec!["m".into()],
        ..v1::AccessTo::default()
    };
    let header =
        v1::AccessHeader { name: "x-team".into(), values: vec!["a".into()], ..v1::AccessHeader::default() };
    let rule =
        v1::AccessRule { name: "readers".into(), from: vec![from], to: vec![to], headers: vec![header] };
    let policy = |name: &str, effect: Effect, rules: &[v1::AccessRule]| v1::AccessPolicy {
        name: name.into(),
        effect: effect.into(),
        rules: rules.to_vec(),
        ..v1::AccessPolicy::default()
    };
    let all = v1::AccessRule::default();
    let allow = policy("team-a/allow", Effect::Allow, &[rule.clone()]);
    let deny = policy("team-a/deny", Effect::Deny, &[rule]);
    let audit = v1::AccessPolicy { audit: true, ..policy("team-a/audit", Effect::Deny, &[all.clone()]) };
    let unreadable =
        v1::AccessPolicy { unreadable: "line 3".into(), ..policy("team-a/broken", Effect::Allow, &[]) };
    [
        vec![allow.clone()],
        vec![deny, policy("team-a/all", Effect::Allow, &[all])],
        vec![audit, allow],
        vec![unreadable],
    ]
}

fn limit() -> v1::RateLimit {
    v1::RateLimit {
        policy: "team-a/limit".into(),
        by_identity: true,
        requests: Some(v1::Rate { count: 10, period_ms: 1_000, burst: 5 }),
        concurrent: 4,
        ..v1::RateLimit::default()
    }
}

const WRONG: &str = "mtls:maybe\nadmission:limit=0\nadmission:limit=8,limit=9\ngpu:always\ngpu:ipc,memory=much\n\
                     opaque-ports:3306,,http\nskip-inbound-ports:7100-7000\nskip-subnets:10.0.0.0/33,::ffff:1.2.3.4/96\n\
                     proxy-cpu:1e3\ntenant-regions:65\nnobodys:x\n";

const YAML: [(&str, &str); 10] = [
    ("service", include_str!("../../../manifests/examples/digits/services.yaml")),
    ("slices", include_str!("../../../manifests/examples/digits/endpointslices.yaml")),
    ("canary", include_str!("../../../manifests/examples/canary/canary.yaml")),
    ("policies", include_str!("../../../manifests/examples/access/policies.yaml")),
    (
        "numbers",
        "mode: 0440\nnewer: 0o440\nhex: 0x1f\nfloat: -1.5e-3\nbig: 18446744073709551615\nnan: .nan\n",
    ),
    ("words", "a: y\nb: no\nc: ~\nd: null\ne: 'it''s'\nf: \"\\u00e9\\x41\\n\"\ng: 2026-11-28\n"),
    ("blocks", "a: |+\n  one\n\n  two\nb: >-\n  folded\n  here\n? long\n: value\n- no\n"),
    ("documents", "---\nkind: A\n...\n---\n# nothing\n---\n{kind: B, items: [{a: 1}, [], {}]}\n"),
    ("twice", "a: 1\na: 2\n"),
    ("merged", "base: &base {a: 1}\none:\n  <<: *base\n  b: 2\ntagged: !!str 1\nbytes: !!binary aGk=\n"),
];

/// Lines that say more and more of what the line before says; `@` is the number of one, `#` that of the one before.
const BOMBS: [(&str, &str); 2] = [
    ("aliases-of-aliases", "a@: &a@ [*a#, *a#, *a#, *a#, *a#, *a#, *a#, *a#]\n"),
    ("nested", "a@: &a@ {a: *a#, b: [*a#]}\n"),
];

const PATHS: [&str; 24] = [
    "/v2/models/m/infer",
    "/a//b/./c/../d/",
    "/../../a",
    "/a/%2e%2e/b",
    "/a/..%2fb",
    "/a/..;/b",
    "/a/..;x=1/b",
    "/a%3Bb",
    "/a\\..\\b",
    "/a%5cb",
    "/%252e%252e/a",
    "/%25%32%65/a",
    "/100%25",
    "/a%c0%afb",
    "/a%00b",
    "/\u{e9}%c3%a9",
    "/%7e%41%2D",
    "/v2/models/org%2Fmodel",
    "*",
    "",
    "a/../b",
    "/a?b=../c#d",
    "/%zz%",
    "/ \"<>{}|^`",
];
