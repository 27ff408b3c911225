fn main() {
    for p in std::env::args().skip(1) {
        let b = std::fs::read(&p).unwrap();
        match rtfmri::dicom::decode(&b) {
            Ok(v) => println!(
                "{p}: {:?} sum {} tr {} acq {} inst {:?}\n  {:?}\n  {:?}",
                v.voxels.dim(),
                v.voxels.iter().map(|v| f64::from(*v)).sum::<f64>(),
                v.header.tr_ms,
                v.header.acquisition,
                v.header.instance,
                v.affine_lps,
                v.header.slice_times_ms
            ),
            Err(e) => println!("{p}: ERR {e}"),
        }
    }
}
