//! Photographs reach the model as finished tensors: sent in any form, alone or in batches, through memory that Triton reads or as
//! bytes; a damaged one fails alone and says why; nothing of the arena is left behind.

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
use penstock_tests::testkit::proxy::metric;
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

    tokio::time::sleep(Duration::from_millis(2200)).await;
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
    let mut mesh = Mesh::default().pod("client", None).service("digits", &[]).pod("a", Some("digits"));
    // Pictures of 64 by 64 in 256 grays become the model's 8 by 8 in 17.
    let pipeline =
        "{resize: {mode: exact, width: 8, height: 8}, colour: gray, normalise: {scale: 0.06274509803921569}}";
    let prepare = format!("{{input: picture, tensor: image, shape: [64], pipeline: {pipeline}}}");
    mesh.file("policy.yaml", &policy("digits", "coalesce: {single-flight: true}", &prepare));
    let address = mesh.application("a").to_string();
    let folder = tempfile::tempdir().unwrap();
    let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/models/repository");
    let _server = Process::start(
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
    let all = digits::load();
    wait_until("a picture is answered through both sidecars", PATIENCE, async || {
        send(&mesh, "digits", "content-type: image/png\r\n", &picture(&all.images[0])).await.status() == 200
    })
    .await;
    let mut right = 0;
    for (pixels, label) in all.images.iter().zip(&all.labels).take(100) {
        let message = send(&mesh, "digits", "content-type: image/png\r\n", &picture(pixels)).await;
        assert_eq!(message.status(), 200, "{}", message.text());
        let answer = rest::decode_response(&message.body.clone().into(), None).unwrap();
        let logits: Vec<f32> = answer.outputs[0].as_fp32().unwrap().collect();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        right += usize::from(best == usize::from(*label));
    }
    assert!(right >= 97, "{right} of 100 right");
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
