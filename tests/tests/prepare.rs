//! Photographs reach the model as finished tensors: sent in any form, alone or in batches, through memory that Triton reads or as
//! bytes; a damaged one fails alone and says why; nothing of the arena is left behind. What cannot be prepared is refused with the
//! reason, and nobody waits for another's huge images.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use penstock_inference::oip::{InferRequest, Tensor, rest};
use penstock_prepare::{Declaration, Limits, Pipeline, Preset, Scratch};
use penstock_tests::digits;
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, Triton};
use penstock_tests::testkit::wire::{Message, get};
use penstock_tests::testkit::{PATIENCE, wait_until};

const PHOTOS: [&str; 6] =
    ["baseline-420.jpg", "progressive.jpg", "exif-6.jpg", "rgba.png", "lossy.webp", "gray.jpg"];

fn photo(name: &str) -> Bytes {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/prepare/tests/images");
    std::fs::read(folder.join(name)).unwrap().into()
}

/// What a pipeline makes of a photograph, in this process.
fn expected(declaration: &Declaration, photo: &[u8]) -> Vec<u8> {
    let pipeline = Pipeline::new(declaration).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    pipeline.run(photo, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
    tensor
}

fn policy(service: &str, settings: &str, prepare: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: {service}, namespace: {NAMESPACE}}}\n\
         spec:\n  targetRef: {{kind: Service, name: {service}}}\n  {settings}\n  models:\n  - name: \"*\"\n    prepare:\n    - {prepare}\n"
    )
}

/// Sends a body to a model, through both sidecars.
async fn send(mesh: &Mesh, model: &str, headers: &str, body: &[u8]) -> Message {
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: {model}.test\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    mesh.client("client").await.ask([head.as_bytes(), body].concat()).await.unwrap()
}

/// An inference request with images as binary tensors, of which the answer is to be binary too.
async fn infer(mesh: &Mesh, model: &str, photos: &[Bytes], headers: &str) -> Message {
    let mut request = InferRequest {
        inputs: vec![Tensor::bytes(
            "image",
            vec![photos.len() as u64],
            photos.iter().map(|photo| &photo[..]),
        )],
        ..InferRequest::default()
    };
    let binary = penstock_inference::oip::Parameter::Bool(true);
    request.parameters.insert("binary_data_output".to_owned(), binary);
    let body = rest::encode_request(&request, true).unwrap();
    let headers = format!("{headers}inference-header-content-length: {}\r\n", body.header_length.unwrap());
    send(mesh, model, &headers, &body.into_bytes()).await
}

/// The tensors that came back, a row each.
fn outputs(message: &Message, name: &str, rows: usize) -> Vec<Bytes> {
    assert_eq!(message.status(), 200, "{}", message.text());
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    let answer = rest::decode_response(&message.body.clone().into(), length).unwrap();
    let output = answer.outputs.iter().find(|output| output.name == name).unwrap();
    assert_eq!(output.shape[0], rows as u64);
    let row = output.data.len() / rows;
    (0..rows).map(|at| output.data.slice(at * row..(at + 1) * row)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn photographs_reach_triton_as_finished_tensors() {
    let mut mesh = Mesh::default().pod("client", None).service("pixels", &[]).pod("a", Some("pixels"));
    let prepare = "{input: image, tensor: pixels, pipeline: {preset: imagenet, dtype: f16}}";
    mesh.file("policy.yaml", &policy("pixels", "batch: {max: 16}", prepare));
    let mesh = mesh.start().await;
    let models = [Model::pixels("pixels").takes(Duration::from_millis(20), Duration::ZERO)];
    let triton = Triton::start_at(mesh.application("a").ip(), &models).await;
    let declaration = Declaration {
        preset: Some(Preset::Imagenet),
        dtype: Some(penstock_prepare::form::Dtype::F16),
        ..Declaration::default()
    };
    wait_until("a photograph is answered through both sidecars", PATIENCE, async || {
        infer(&mesh, "pixels", &[photo(PHOTOS[0])], "").await.status() == 200
    })
    .await;
    // From now on it is known that Triton reads shared memory, and that it may be sent batches.
    tokio::time::sleep(Duration::from_millis(500)).await;

    let photos: Vec<Bytes> = PHOTOS.iter().map(|name| photo(name)).collect();
    let expected: Vec<Vec<u8>> = photos.iter().map(|photo| expected(&declaration, photo)).collect();
    let alone = infer(&mesh, "pixels", &photos[..1], "penstock-batch: off\r\n").await;
    assert_eq!(outputs(&alone, "back", 1)[0], expected[0]);
    let rows = infer(&mesh, "pixels", &photos, "").await;
    for (at, row) in outputs(&rows, "back", photos.len()).iter().enumerate() {
        assert_eq!(row, &expected[at], "{}", PHOTOS[at]);
    }

    // Many at once, in batches; every fifth is damaged and fails alone, with its reason.
    let damaged = photos[0].slice(..photos[0].len() / 3);
    let many = futures_util::future::join_all((0..40).map(|nth| {
        let (mesh, photos, damaged) = (&mesh, &photos, &damaged);
        async move {
            let photo = if nth % 5 == 4 { damaged.clone() } else { photos[nth % photos.len()].clone() };
            infer(mesh, "pixels", &[photo], "penstock-batch: show\r\n").await
        }
    }))
    .await;
    let mut largest = 0;
    for (nth, message) in many.iter().enumerate() {
        if nth % 5 == 4 {
            assert_eq!((message.status(), message.head.get("penstock-error")), (400, Some("bad-input")));
            assert!(message.text().contains("input \"image\", row 0: damaged JPEG"), "{}", message.text());
            continue;
        }
        assert_eq!(outputs(message, "back", 1)[0], expected[nth % photos.len()], "request {nth}");
        let shown = message.head.get("penstock-batch").unwrap().split_once(";rows=").unwrap().1.to_owned();
        largest = largest.max(shown.parse::<u32>().unwrap());
    }
    assert!(largest > 1, "none of them shared an execution");

    // An image as it is, a form, and base64 in JSON.
    let headers = "content-type: image/jpeg\r\n";
    let sum = |message: &Message| {
        assert_eq!(message.status(), 200, "{}", message.text());
        let answer: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
        let outputs = answer["outputs"].as_array().unwrap();
        outputs.iter().find(|output| output["name"] == "sum").unwrap()["data"].clone()
    };
    let only_sum = |image: &str| {
        format!(
            r#"{{"inputs":[{{"name":"image","datatype":"BYTES","shape":[1],"data":["{image}"]}}],"outputs":[{{"name":"sum"}}]}}"#
        )
    };
    let text = base64::engine::general_purpose::STANDARD.encode(&photos[0]);
    let of_json = sum(&send(&mesh, "pixels", "", only_sum(&text).as_bytes()).await);
    let form = |name: &str| {
        [
            format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"a.jpg\"\r\n\r\n")
                .as_bytes(),
            &photos[0],
            b"\r\n--x--\r\n",
        ]
        .concat()
    };
    let plain = send(&mesh, "pixels", headers, &photos[0]).await;
    let of_form =
        send(&mesh, "pixels", "content-type: multipart/form-data; boundary=x\r\n", &form("image")).await;
    assert_eq!((sum(&plain), sum(&of_form)), (of_json.clone(), of_json));
    let wrong =
        send(&mesh, "pixels", "content-type: multipart/form-data; boundary=x\r\n", &form("photo")).await;
    assert!(wrong.status() == 400 && wrong.text().contains("write image"), "{}", wrong.text());
    // A bomb: 60,000 by 60,000 pixels in some hundred bytes.
    let bomb = infer(&mesh, "pixels", &[bomb()], "").await;
    assert!(bomb.status() == 400 && bomb.text().contains("refused before decoding"), "{}", bomb.text());

    counts_are_told().await;
    let counted = async |name: &str, label: &str| metric(mesh.admin("a"), name, &[label]).await;
    assert!(
        counted("penstock_executions_placed_total", "").await > 5.0,
        "nothing went through shared memory"
    );
    assert_eq!(counted("penstock_arena_bytes", "").await, 0.0, "the arena is not empty");
    assert!(counted("penstock_prepared_total", "refused").await >= 9.0);
    drop(triton);
}

/// A PNG whose head says that it is huge.
fn bomb() -> Bytes {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    png.extend([0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60, 8, 2, 0, 0, 0]);
    let crc = png[12..].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    });
    png.extend((!crc).to_be_bytes());
    png.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82");
    png.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_picture_of_a_digit_gets_the_right_class() {
    let (mesh, _server, _folder) = digits_behind(PICTURE).await;
    let all = digits::load();
    is_answered(&mesh, "content-type: image/png\r\n", &picture(&all.images[0])).await;
    let mut right = 0;
    for (pixels, label) in all.images.iter().zip(&all.labels).take(100) {
        let message = send(&mesh, "digits", "content-type: image/png\r\n", &picture(pixels)).await;
        right += usize::from(best(&logits(&message)) == usize::from(*label));
    }
    assert!(right >= 97, "{right} of 100 right");
}

/// Pictures of 64 by 64 in 256 grays become the model's 8 by 8 in 17.
const PICTURE: &str = "{input: picture, tensor: image, shape: [64], pipeline: {resize: {mode: exact, width: 8, height: 8}, \
                       colour: gray, normalise: {scale: 0.06274509803921569}}}";

/// Two sidecars before the model of digits, of which an input is prepared.
async fn digits_behind(prepare: &str) -> (Mesh, Process, tempfile::TempDir) {
    let mut mesh = Mesh::default().pod("client", None).service("digits", &[]).pod("a", Some("digits"));
    mesh.file("policy.yaml", &policy("digits", "coalesce: {single-flight: true}", prepare));
    let address = mesh.application("a").to_string();
    let folder = tempfile::tempdir().unwrap();
    let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/models/repository");
    let server = Process::start(
        "modelserver",
        Path::new(env!("CARGO_BIN_EXE_penstock-modelserver")),
        &["--repository", repository, "--only", "digits:2", "--listen", &address],
        folder.path(),
    );
    let mesh = mesh.start().await;
    wait_until("the model server answers", PATIENCE, async || {
        get(mesh.application("a"), "/v2/health/ready").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    (mesh, server, folder)
}

fn logits(message: &Message) -> Vec<f32> {
    assert_eq!(message.status(), 200, "{}", message.text());
    let answer = rest::decode_response(&message.body.clone().into(), None).unwrap();
    answer.outputs[0].as_fp32().unwrap().collect()
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}

/// Waits until a picture gets through both sidecars.
async fn is_answered(mesh: &Mesh, head: &str, picture: &[u8]) {
    wait_until("a picture is answered through both sidecars", PATIENCE, async || {
        send(mesh, "digits", head, picture).await.status() == 200
    })
    .await;
}

/// A request in JSON for one element of an input.
fn json(input: &str, element: &str) -> Vec<u8> {
    let input = serde_json::json!({"name": input, "datatype": "BYTES", "shape": [1], "data": [element]});
    serde_json::to_vec(&serde_json::json!({"inputs": [input]})).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_picture_is_taken_however_it_is_sent_or_refused_with_the_reason() {
    let (mesh, _server, _folder) = digits_behind(PICTURE).await;
    let picture = picture(&digits::load().images[0]);
    let png = "content-type: image/png\r\n";
    is_answered(&mesh, png, &picture).await;
    let expected = logits(&send(&mesh, "digits", png, &picture).await);
    for kind in ["Image/PNG", "application/x-www-form-urlencoded", "application/octet-stream"] {
        let answer = send(&mesh, "digits", &format!("content-type: {kind}\r\n"), &picture).await;
        assert_eq!(logits(&answer), expected, "{kind}");
    }
    let to = |path: &str, headers: &str, length: usize| {
        format!("POST {path} HTTP/1.1\r\nhost: digits.test\r\n{png}{headers}content-length: {length}\r\n\r\n")
    };
    let head = to("/v2/models/digits/infer?x=1", "", picture.len());
    let answer = mesh.client("client").await.ask([head.as_bytes(), &picture].concat()).await.unwrap();
    assert_eq!(logits(&answer), expected, "with a query");

    let text = base64::engine::general_purpose::STANDARD.encode(&picture);
    let lines: Vec<_> = text.as_bytes().chunks(76).map(|line| String::from_utf8_lossy(line)).collect();
    for text in
        [lines.join("\n"), text.trim_end_matches('=').to_owned(), format!("data:image/png;base64,{text}")]
    {
        assert_eq!(logits(&send(&mesh, "digits", "", &json("picture", &text)).await), expected);
    }

    let refused = |answer: &Message, status: u16, reason: &str, words: &str| {
        assert_eq!((answer.status(), answer.reason()), (status, Some(reason)), "{}", answer.text());
        assert!(answer.text().contains(words), "{}", answer.text());
    };
    let broken =
        send(&mesh, "digits", "", &json("picture", &format!("{}?{}", &text[..20], &text[20..]))).await;
    refused(&broken, 400, "bad-input", "looks like base64, which breaks at byte 20");
    let misnamed = send(&mesh, "digits", "", &json("img", &text)).await;
    refused(&misnamed, 400, "bad-input", "input \"img\" has no pipeline; write picture");
    let coded = send(&mesh, "digits", &format!("{png}content-encoding: gzip\r\n"), &picture).await;
    refused(&coded, 415, "body-encoded", "gzip");

    let mut large = mesh.client("client").await;
    large.send(to("/v2/models/digits/infer", "", (64 << 20) + 1)).await.unwrap();
    refused(&large.response().await.unwrap(), 413, "body-too-large", "67108864 bytes");
    let mut slow = mesh.client("client").await;
    slow.send([to("/v2/models/digits/infer", "", picture.len()).as_bytes(), &picture[..50]].concat())
        .await
        .unwrap();
    refused(&slow.response().await.unwrap(), 408, "body-timeout", "every 10s");
    assert_eq!(logits(&send(&mesh, "digits", png, &picture).await), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_in_nv12_is_letterboxed_sent_as_numbers_or_in_base64() {
    let prepare = "{input: frame, tensor: image, shape: [64], pipeline: {input: {format: nv12, width: 64, height: 64}, \
                   resize: {mode: letterbox, width: 8, height: 8}, colour: gray, normalise: {scale: 0.06274509803921569}}}";
    let (mesh, _server, _folder) = digits_behind(prepare).await;
    let all = digits::load();
    // Luma from 16 to 235, and no colour.
    let frame = |pixels: &[u8; digits::PIXELS]| -> Vec<u8> {
        let luma = (0..64 * 64).map(|at| 16 + u16::from(pixels[at / 512 * 8 + at % 64 / 8]) * 219 / 16);
        luma.map(|luma| luma as u8).chain(std::iter::repeat_n(128, 64 * 32)).collect()
    };
    let of_text = async |frame: &[u8]| {
        let text = base64::engine::general_purpose::STANDARD.encode(frame);
        send(&mesh, "digits", "", &json("frame", &text)).await
    };
    wait_until("a frame is answered through both sidecars", PATIENCE, async || {
        of_text(&frame(&all.images[0])).await.status() == 200
    })
    .await;
    let mut right = 0;
    for (pixels, label) in all.images.iter().zip(&all.labels).take(20) {
        let frame = frame(pixels);
        let numbers = serde_json::json!({"inputs": [
            {"name": "frame", "datatype": "UINT8", "shape": [1, frame.len()], "data": frame}
        ]});
        let of_numbers = send(&mesh, "digits", "", &serde_json::to_vec(&numbers).unwrap()).await;
        let scores = logits(&of_numbers);
        assert_eq!(logits(&of_text(&frame).await), scores);
        right += usize::from(best(&scores) == usize::from(*label));
    }
    assert!(right >= 18, "{right} of 20 right");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_huge_images_delays_neither_a_small_one_nor_a_deadline() {
    let (mesh, _server, _folder) = digits_behind(PICTURE).await;
    let picture = picture(&digits::load().images[0]);
    let png = "content-type: image/png\r\n";
    is_answered(&mesh, png, &picture).await;
    let huge = black(5_200);
    let form = |many: usize| {
        let part = b"--x\r\ncontent-disposition: form-data; name=\"picture\"; filename=\"a.png\"\r\n\r\n";
        let parts = (0..many).map(|_| [&part[..], &huge, b"\r\n"].concat());
        parts.chain([b"--x--\r\n".to_vec()]).collect::<Vec<_>>().concat()
    };
    let headers = "content-type: multipart/form-data; boundary=x\r\n";
    let (large, small) = (form(12), form(1));
    let mut large = Box::pin(send(&mesh, "digits", headers, &large));
    let others = async {
        wait_until("its images wait", PATIENCE, async || {
            metric(mesh.admin("a"), "penstock_prepare_waiting", &[]).await > 5.0
        })
        .await;
        let answer = send(&mesh, "digits", png, &picture).await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
        // It cannot be begun before the others, and waits no longer than its client does.
        let began = tokio::time::Instant::now();
        let late = send(&mesh, "digits", &format!("{headers}x-request-timeout: 300ms\r\n"), &small).await;
        assert_eq!((late.status(), late.reason()), (503, Some("too-late")), "{}", late.text());
        began.elapsed()
    };
    let took = tokio::select! {
        biased;
        took = others => took,
        answer = &mut large => panic!("the large one was answered first: {}", answer.text()),
    };
    assert!(took < Duration::from_secs(3), "{took:?} for a deadline of 0.3 s");
    // Sixteen seconds of work that nobody wants to see done.
    drop(large);
}

/// A black PNG of that many pixels a side, in a few kilobytes.
fn black(side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let pixels = vec![0; (side * side) as usize];
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    bytes
}

/// A PNG of 64 by 64 grays, eight for each pixel of the digit.
fn picture(pixels: &[u8; digits::PIXELS]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 64, 64);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let gray = |at: usize| {
        let (row, column) = (at / 64 / 8, at % 64 / 8);
        (u16::from(pixels[row * 8 + column]) * 255 / 16) as u8
    };
    let grays: Vec<u8> = (0..64 * 64).map(gray).collect();
    encoder.write_header().unwrap().write_image_data(&grays).unwrap();
    bytes
}
