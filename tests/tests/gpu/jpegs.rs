//! JPEGs by nvJPEG, on the STAND-IN's own (`kernels/standin`): who decodes what, and whose fault it is when it does not work.

use std::time::Duration;

use bytes::Bytes;
use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::{PATIENCE, wait_until};

use super::{Bed, PHOTOS, PIPELINE, ROW, SCRIPT, expected, many_photographs, output, photo, send, standin};

/// What the stand-in's nvJPEG makes of a photograph is brighter by one, so that its pixels are told from the CPU's; the pixels
/// are made into numbers from -2 to 2.
const SHADE: f32 = 1.0 / 255.0 / 0.25;

/// A bed whose sidecar has been told where nvJPEG is.
async fn with_nvjpeg(gpu: &str, script: &str, library: Option<&str>) -> Bed {
    with_threads(gpu, script, library, 2).await
}

/// The same, with so many threads that prepare.
async fn with_threads(gpu: &str, script: &str, library: Option<&str>, threads: u32) -> Bed {
    let (driver, own) = (standin().display().to_string(), standin().display().to_string());
    let policy = format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: pixels, namespace: {NAMESPACE}}}\n\
         spec:\n  targetRef: {{kind: Service, name: pixels}}\n  batch: {{max: 16}}\n  models:\n  - name: pixels\n    \
         prepare:\n    - {{input: image, tensor: pixels, pipeline: {PIPELINE}}}\n"
    );
    let mut mesh = Mesh::default()
        .pod("client", None)
        .service("pixels", &[])
        .pod("a", Some("pixels"))
        .annotate_pod("a", annotation::GPU, gpu)
        .variable("a", "PENSTOCK_CUDA_DRIVER", &driver)
        .variable("a", "PENSTOCK_NVJPEG", library.unwrap_or(&own))
        .variable("a", SCRIPT, script)
        .option("a", &format!("--prepare-threads={threads}"));
    mesh.file("policy.yaml", &policy);
    Bed::of(mesh, "").await
}

/// The largest and the mean difference of an answer from what the CPU makes of a photograph.
fn off(found: &[u8], wanted: &[u8]) -> (f32, f32) {
    let number = |le: &[u8]| f32::from_le_bytes(le.try_into().unwrap());
    let off: Vec<f32> = found
        .chunks_exact(4)
        .zip(wanted.chunks_exact(4))
        .map(|(found, wanted)| (number(found) - number(wanted)).abs())
        .collect();
    (off.iter().copied().fold(0.0, f32::max), off.iter().sum::<f32>() / off.len() as f32)
}

/// Photographs of all forms from several clients; returns how many answers were not the CPU's own, all of them JPEGs.
async fn near_photographs(bed: &Bed, clients: usize, requests: usize) -> usize {
    let photos: Vec<Bytes> = PHOTOS.iter().map(|name| photo(name)).collect();
    let expected: Vec<Vec<u8>> = photos.iter().map(|photo| expected(photo)).collect();
    let all = (0..clients).map(|client| {
        let (photos, expected) = (&photos, &expected);
        async move {
            let (mut wire, mut others) = (bed.client().await, 0);
            for nth in 0..requests {
                let which: Vec<usize> =
                    (0..1 + nth % 3).map(|row| (client + nth + row) % photos.len()).collect();
                let sent: Vec<Bytes> = which.iter().map(|at| photos[*at].clone()).collect();
                let answer = output(&send(&mut wire, &sent, "").await);
                for (row, at) in answer.chunks_exact(4 * ROW).zip(which) {
                    if row == expected[at] {
                        continue;
                    }
                    let (most, mean) = off(row, &expected[at]);
                    assert!(PHOTOS[at].ends_with(".jpg"), "{} is not what the CPU makes of it", PHOTOS[at]);
                    assert!(most < 1.1 * SHADE && mean > 0.5 * SHADE, "{}: {most}, {mean}", PHOTOS[at]);
                    others += 1;
                }
            }
            others
        }
    });
    futures_util::future::join_all(all).await.into_iter().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jpegs_are_decoded_by_nvjpeg_and_others_by_the_cpu_in_one_batch() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "delay=300us; shade=1", None).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    wait_until("nvJPEG has decoded rows", PATIENCE, async || {
        near_photographs(&bed, 1, 4).await;
        bed.metric("penstock_decoded_gpu_total", "").await > 4.0
    })
    .await;
    let others = near_photographs(&bed, 6, 8).await;
    assert!(others > 20, "{others} answers were nvJPEG's");
    assert_eq!(bed.metric("penstock_gpu_failures_total", "").await, 0.0);
    let (decoded, made) =
        (bed.counted("penstock_decoded_gpu_total").await, bed.counted("penstock_prepared_gpu_total").await);
    assert!(decoded < made, "{decoded} of {made}: PNG and WebP are the CPU's");
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_word_or_the_library_the_cpu_decodes_to_the_same_bits() {
    let table = [
        ("ipc,always", "", None, "tensors may be handed over"),
        ("ipc,nvjpeg,always", "", Some("/nowhere/libnvjpeg.so.12"), "nvJPEG is not used: "),
        ("ipc,nvjpeg,always", "", Some("libc.so.6"), "it has no nvjpegGetProperty"),
        ("ipc,nvjpeg,always", "nvjpeg=10.2.0", None, "has version 10"),
        ("ipc,nvjpeg,always", "fail=nvjpegCreateEx:6", None, "NVJPEG_STATUS_EXECUTION_FAILED"),
        ("ipc,nvjpeg,always", "fail=nvjpegJpegStateCreate:5", None, "NVJPEG_STATUS_ALLOCATOR_FAILURE"),
        ("ipc,nvjpeg,always", "fail=nvjpegDecode:4", None, "NVJPEG_STATUS_JPEG_NOT_SUPPORTED"),
        ("ipc,nvjpeg,always", "shade=60", None, "nvJPEG gives other pixels than the CPU"),
    ];
    for (gpu, script, library, words) in table {
        let mut bed = with_nvjpeg(gpu, script, library).await;
        bed.logs(words).await;
        wait_until(&format!("{words}: a kernel has made rows"), PATIENCE, async || {
            many_photographs(&bed, 1, 4).await;
            bed.metric("penstock_prepared_gpu_total", "").await > 4.0
        })
        .await;
        many_photographs(&bed, 3, 6).await;
        assert_eq!(bed.counted("penstock_decoded_gpu_total").await, 0.0, "{words}");
        assert_eq!(bed.mesh.sidecar("a").said().matches(words).count(), 1, "{words}: told once");
        bed.is_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nvjpeg_does_not_decode_the_cpu_does_and_no_request_is_lost() {
    // The first decode is the test's.
    for (script, words) in [
        ("fail=nvjpegDecode:4@8", ""),
        ("fail=nvjpegGetImageInfo:3@8", ""),
        ("fail=nvjpegDecode:5@8", "JPEGs are decoded on the CPU for 10s"),
        // What the library says of single files, and of a device that does not work: the picture that is built in tells.
        ("fail=nvjpegDecode:2@8", ""),
        ("fail=nvjpegDecode:6@8", ""),
        ("fail=nvjpegDecode:8@8", ""),
        ("fail=nvjpegGetImageInfo:2@8", ""),
        ("fail=nvjpegDecode:6@8+", "JPEGs are decoded on the CPU for 10s"),
        ("fail=nvjpegDecode:8@8+", "JPEGs are decoded on the CPU from now on"),
        ("fail=nvjpegDecode:7@8+", "JPEGs are decoded on the CPU from now on"),
        ("lose=nvjpegDecode:719@8", "the GPU is not used any more"),
        ("delay=1ms; stall=nvjpegDecode@8", "was not done within"),
    ] {
        let mut bed = with_nvjpeg("ipc,nvjpeg,always", &format!("shade=1; {script}"), None).await;
        bed.logs("JPEGs may be decoded by nvJPEG").await;
        let counts =
            if words.is_empty() { "penstock_refused_gpu_total" } else { "penstock_gpu_failures_total" };
        wait_until(&format!("{script}: it has failed"), PATIENCE, async || {
            near_photographs(&bed, 2, 3).await;
            bed.metric(counts, "").await > 0.0
        })
        .await;
        let before = bed.counted("penstock_decoded_gpu_total").await;
        near_photographs(&bed, 3, 6).await;
        let said = bed.mesh.sidecar("a").said();
        if words.is_empty() {
            assert!(
                !said.contains("JPEGs are decoded on the CPU"),
                "{script}: a file says nothing of the next"
            );
            // Of its batch only the file itself went to the CPU.
            assert_eq!(bed.counted("penstock_refused_gpu_total").await, 1.0, "{script}");
            assert_eq!(bed.counted("penstock_gpu_failures_total").await, 0.0, "{script}");
            assert!(bed.counted("penstock_decoded_gpu_total").await > before, "{script}");
        } else {
            assert_eq!(said.matches(words).count(), 1, "{script}: told once");
        }
        if !script.contains("lose") && !script.contains("stall") {
            bed.is_empty().await;
        }
    }
}

/// Noise where pixels should be: what is damaged is found only when its batch is executed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_jpeg_costs_its_sender_an_answer_and_nobody_else() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "shade=1", None).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    wait_until("nvJPEG has decoded rows", PATIENCE, async || {
        near_photographs(&bed, 1, 4).await;
        bed.metric("penstock_decoded_gpu_total", "").await > 4.0
    })
    .await;
    // Its markers are whole, but no Huffman code is all ones.
    let good = photo("baseline-420.jpg");
    let mut bytes = good.to_vec();
    let scan = bytes.windows(2).position(|two| two == [0xff, 0xda]).unwrap() + 14;
    let end = bytes.len() - 2;
    bytes[scan..end].chunks_exact_mut(2).for_each(|two| two.copy_from_slice(&[0xff, 0]));
    let (bad, damaged) = (Bytes::from(bytes), PATIENCE);
    let both = async {
        let mut wire = bed.client().await;
        for _ in 0..12 {
            let message = send(&mut wire, &[good.clone(), bad.clone()], "").await;
            assert_eq!((message.status(), message.head.get("penstock-error")), (400, Some("bad-input")));
            assert!(message.text().contains("row 1: damaged JPEG"), "{}", message.text());
        }
    };
    let others = near_photographs(&bed, 4, 12);
    tokio::time::timeout(damaged, async { futures_util::future::join(both, others).await }).await.unwrap();
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nvjpeg_is_slower_the_cpu_decodes() {
    let bed = with_nvjpeg("ipc,nvjpeg", "shade=1; unpacked=40ms", None).await;
    let file = [photo("baseline-420.jpg")];
    let mut client = bed.client().await;
    wait_until("nvJPEG's way is measured", 3 * PATIENCE, async || {
        output(&send(&mut client, &file, "").await);
        bed.metric("penstock_decoded_gpu_total", "").await >= 8.0
    })
    .await;
    let before = bed.counted("penstock_decoded_gpu_total").await;
    for _ in 0..60 {
        output(&send(&mut client, &file, "").await);
    }
    let by_nvjpeg = bed.counted("penstock_decoded_gpu_total").await - before;
    assert!(by_nvjpeg < 15.0, "{by_nvjpeg} of 60 went the slower way");
}

/// The test at the start has a stream of its own: one that never ends is given up, and holds up nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_test_of_nvjpeg_that_does_not_end_leaves_the_gpu_to_others() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "stall=nvjpegDecode", None).await;
    bed.goes_over_the_gpu().await;
    bed.logs("nvJPEG was not done with the picture that is built in within 2s").await;
    wait_until("a kernel has made rows", PATIENCE, async || {
        many_photographs(&bed, 1, 4).await;
        bed.metric("penstock_prepared_gpu_total", "").await > 4.0
    })
    .await;
    bed.goes_over_the_gpu().await;
    assert!(!bed.mesh.sidecar("a").said().contains("the GPU is not used any more"));
    assert_eq!(bed.counted("penstock_gpu_failures_total").await, 0.0);
    assert_eq!(bed.counted("penstock_decoded_gpu_total").await, 0.0);
    bed.is_empty().await;
}

/// A library that takes long to begin with keeps one thread, and not another one each second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nvjpeg_that_takes_long_to_start_keeps_one_thread() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "unpacked=9000ms", None).await;
    bed.logs("tensors may be handed over in the GPU's memory").await;
    let begun = bed.mesh.sidecar("a").threads();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let now = bed.mesh.sidecar("a").threads();
    assert!(
        !bed.mesh.sidecar("a").said().contains("JPEGs may be decoded by nvJPEG"),
        "it was done too early"
    );
    assert!(now <= begun + 1, "{begun} threads, and five seconds later {now}");
}

/// Files that take long to unpack on the thread that fills a batch are nvJPEG's trouble: eight of them take 2.4 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_unpacked_too_slowly_rest_nvjpeg_and_not_the_gpu() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "shade=1; unpacked=300ms", None).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    let batch = vec![photo("baseline-420.jpg"); 8];
    let wanted = expected(&batch[0]);
    let mut wire = bed.client().await;
    wait_until("nvJPEG rests", PATIENCE, async || {
        let answer = output(&send(&mut wire, &batch, "").await);
        assert!(answer.chunks_exact(4 * ROW).all(|row| off(row, &wanted).0 < 1.1 * SHADE));
        bed.mesh.sidecar("a").said().contains("were not unpacked within 2s")
    })
    .await;
    let before = bed.counted("penstock_prepared_gpu_total").await;
    let answer = output(&send(&mut wire, &batch, "").await);
    assert!(answer.chunks_exact(4 * ROW).all(|row| row == wanted), "the CPU decodes");
    assert_eq!(
        bed.counted("penstock_prepared_gpu_total").await - before,
        8.0,
        "and a kernel makes the tensors"
    );
    assert!(!bed.mesh.sidecar("a").said().contains("the GPU is not used any more"));
    bed.is_empty().await;
}

/// nvJPEG unpacks files on a thread of ours, which is one of those that prepare.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_threads_unpack_files_than_prepare() {
    let script = "shade=1; unpacked=25ms; unpackers=1";
    let mut bed = with_threads("ipc,nvjpeg,always", script, None, 1).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    wait_until("nvJPEG has decoded rows", PATIENCE, async || {
        near_photographs(&bed, 6, 4).await;
        bed.metric("penstock_decoded_gpu_total", "").await > 30.0
    })
    .await;
    assert_eq!(
        bed.counted("penstock_gpu_failures_total").await,
        0.0,
        "two threads at once, which it refuses"
    );
    bed.is_empty().await;
}
