//! GE's and Philips' classic files: one slice each.
//!
//! The slice's volume is its temporal position; GE files without one are numbered by
//! instance, volume after volume. Philips' values are brought to floating-point units, which
//! are the same for every file of a series, by the private scale slope.

use ndarray::Array2;

use super::DicomError;
use super::ge::{self, Protocol};
use super::geometry::{self, Directions, check_mm};
use super::header::{Item, tags};
use super::kind::{self, refuse};
use super::pixels::Layout;
use crate::volume::{Slice, SliceHeader};

/// Decodes one GE slice.
///
/// # Errors
/// [`DicomError`], naming the element.
pub(super) fn decode_ge(top: &Item<'_>) -> Result<Slice, DicomError> {
    let slices = top
        .private_whole(tags::LOCATIONS)
        .filter(|slices| *slices > 0);
    let instance = top.whole(tags::INSTANCE_NUMBER);
    let by_instance = || {
        let (instance, slices) = (instance?.checked_sub(1)?, slices?);
        Some((instance / slices + 1, instance % slices))
    };
    let number = volume_number(top).or_else(|| Some(by_instance()?.0));
    // Places within a stack are counted from 1; instances of a volume follow them.
    let in_stack = top.whole(tags::IN_STACK_POSITION);
    let rank = match in_stack.and_then(|place| place.checked_sub(1)) {
        Some(rank) => Some(rank),
        None => by_instance().map(|(_, rank)| rank),
    };
    let protocol = top.private_bytes(tags::GE_PROTOCOL).and_then(ge::read);
    let trigger_ms = top
        .number(tags::TRIGGER_TIME)
        .ok()
        .filter(|time| *time > 0.0);
    let acquired_ms = top.acquired_ms();
    // AcquisitionTime is the run's start, to the second; triggers count from it.
    let time_ms = acquired_ms
        .zip(trigger_ms)
        .map(|(start, after)| start + after);
    let pause_ms = protocol.map_or(0.0, |protocol: Protocol| protocol.pause_ms);
    let slice = read(top, number, |value| value)?;
    Ok(Slice {
        header: SliceHeader {
            slices,
            tr_ms: slice.header.tr_ms + pause_ms,
            time_ms,
            taken_ms: trigger_ms,
            rank,
            order: protocol.and_then(|protocol| protocol.order),
            ..slice.header
        },
        ..slice
    })
}

/// Decodes one Philips slice.
///
/// # Errors
/// [`DicomError`], naming the element.
pub(super) fn decode_philips(top: &Item<'_>) -> Result<Slice, DicomError> {
    if top.number(tags::B_VALUE).is_ok_and(|value| value > 0.0) {
        return refuse("a diffusion image");
    }
    let or = |tag, usual| {
        if top.has(tag) {
            top.number(tag)
        } else {
            Ok(usual)
        }
    };
    let slope = or(tags::RESCALE_SLOPE, 1.0)?;
    let intercept = or(tags::RESCALE_INTERCEPT, 0.0)?;
    let unit = match top.private_number(tags::SCALE_SLOPE) {
        Some(scale) if scale > 0.0 => slope * scale,
        Some(_) => {
            return Err(DicomError::Value {
                element: "(2005,100e) ScaleSlope",
                what: "not above 0",
            });
        }
        // Older releases have display units alone.
        None => 1.0,
    };
    if !(slope > 0.0 && unit > 0.0) {
        return Err(DicomError::Value {
            element: tags::RESCALE_SLOPE.name,
            what: "not above 0",
        });
    }
    let scaled = |stored: f64| (stored * slope + intercept) / unit;
    let slice = read(top, volume_number(top), scaled)?;
    let slices = top.private_whole(tags::PHILIPS_SLICES);
    Ok(Slice {
        header: SliceHeader {
            slices: slices.filter(|slices| *slices > 0),
            time_ms: top.acquired_ms(),
            ..slice.header
        },
        ..slice
    })
}

fn volume_number(top: &Item<'_>) -> Option<u32> {
    top.whole(tags::TEMPORAL_POSITION)
        .filter(|number| *number > 0)
}

/// What both vendors' files have in common.
///
/// - `scaled`: a stored value in the units of the volume.
fn read(
    top: &Item<'_>,
    number: Option<u32>,
    scaled: impl Fn(f64) -> f64,
) -> Result<Slice, DicomError> {
    kind::refuse_other_contrasts(top.words(tags::IMAGE_TYPE))?;
    kind::refuse_later_echo(top)?;
    let layout = Layout::of(top)?;
    let pixels = layout.data(top, 1)?;
    let directions = Directions::of(top)?;
    let mut spacing_mm = None;
    for tag in [tags::SLICE_THICKNESS, tags::SLICE_SPACING] {
        if top.has(tag) {
            let spacing = top.number(tag)?;
            check_mm(tag, spacing)?;
            spacing_mm = Some(spacing);
        }
    }
    let values = layout
        .values(pixels)
        .map(|value| super::single(scaled(f64::from(value))))
        .collect();
    let pixels = Array2::from_shape_vec((layout.rows, layout.columns), values);
    Ok(Slice {
        pixels: pixels.map_err(|_| DicomError::Missing {
            element: tags::PIXEL_DATA.name,
        })?,
        position_lps: geometry::position(top)?,
        columns_lps: directions.columns,
        rows_lps: directions.rows,
        pixel_mm: geometry::pixel_mm(top)?,
        spacing_mm,
        header: SliceHeader {
            series_uid: top.series()?,
            patient: top.patient(),
            number: number.ok_or(DicomError::Missing {
                element: "(0020,0100) TemporalPositionIdentifier",
            })?,
            slices: None,
            instance: top.whole(tags::INSTANCE_NUMBER),
            tr_ms: geometry::tr_ms(top)?,
            time_ms: None,
            taken_ms: None,
            rank: None,
            order: None,
        },
    })
}
