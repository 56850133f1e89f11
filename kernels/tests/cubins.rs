//! The compiled kernels are those of the sources that lie beside them: `kernels/cubin/MANIFEST` says which, and `make
//! cubins` makes both anew.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn sha256(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
    digest.as_ref().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn manifest() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("cubin/MANIFEST")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split_once("  ").unwrap())
        .map(|(sum, name)| (name.to_owned(), sum.to_owned()))
        .collect()
}

fn names(dir: &str, endings: &[&str]) -> BTreeSet<String> {
    let entries = std::fs::read_dir(Path::new(ROOT).join(dir)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let ends =
        |path: &PathBuf| endings.iter().any(|ending| path.extension().is_some_and(|found| found == *ending));
    paths.filter(ends).map(|path| format!("{dir}/{}", path.file_name().unwrap().to_str().unwrap())).collect()
}

#[test]
fn no_source_changed_since_the_cubins_were_made() {
    for (name, sum) in manifest() {
        let found = sha256(&Path::new(ROOT).join(&name));
        assert_eq!(
            found, sum,
            "kernels/{name} is not what the cubins were made of, or with: run `make cubins`"
        );
    }
}

#[test]
fn every_source_and_every_image_is_in_the_manifest() {
    let listed: BTreeSet<String> = manifest().into_iter().map(|(name, _)| name).collect();
    let there = &names("cuda", &["h", "cu"]) | &names("cubin", &["cubin", "ptx"]);
    assert_eq!(listed, there);
    assert!(there.len() > 7);
}

#[test]
fn no_kernel_spills_and_all_leave_room_for_a_thousand_threads() {
    let text = std::fs::read_to_string(Path::new(ROOT).join("cubin/MANIFEST")).unwrap();
    let used: Vec<(&str, u32, u32)> = text
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.strip_prefix("# sm_")?.split_once(' ')?;
            let (name, rest) = rest.split_once(": ")?;
            let (registers, rest) = rest.split_once(" registers, ")?;
            let (spilled, _) = rest.split_once(" bytes spilled")?;
            Some((name, registers.parse().ok()?, spilled.parse().ok()?))
        })
        .collect();
    // Seven architectures, eleven kernels.
    assert_eq!(used.len(), 77);
    for (name, registers, spilled) in used {
        assert!(registers <= 64 && spilled == 0, "{name}: {registers} registers, {spilled} bytes spilled");
    }
}

#[test]
fn machine_code_has_every_kernel() {
    for name in names("cubin", &["cubin", "ptx"]) {
        let image = std::fs::read(Path::new(ROOT).join(&name)).unwrap();
        for kernel in [
            "prepare_rgb",
            "prepare_gray",
            "prepare_nv12",
            "prepare_i420",
            "convert_same",
            "convert_turned",
            "gather",
            "scatter",
        ] {
            let kernel = format!("penstock_{kernel}");
            assert!(image.windows(kernel.len()).any(|bytes| bytes == kernel.as_bytes()), "{name}: {kernel}");
        }
    }
}
