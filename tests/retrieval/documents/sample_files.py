"""Small files of each format, made by hand or by the libraries that write them."""

from io import BytesIO


def pdf(*pages: str, outline: tuple[tuple[str, int], ...] = (), title: str | None = None) -> bytes:
    """A PDF of one line of text a page, with an outline of headings and the numbers of their pages, from 0."""
    from pypdf import PdfReader, PdfWriter

    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, words in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({words}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources {font} /Contents {4 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{item}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    data += f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()
    if not outline and title is None:
        return data
    writer = PdfWriter(clone_from=PdfReader(BytesIO(data)))
    parent = None
    for heading, page in outline:  # each below the one before
        parent = writer.add_outline_item(title=heading, page_number=page, parent=parent)
    if title is not None:
        writer.add_metadata({"/Title": title})
    written = BytesIO()
    writer.write(written)
    return written.getvalue()


def encrypted_pdf(words: str, password: str) -> bytes:
    """A PDF that opens with a password."""
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(BytesIO(pdf(words))))
    writer.encrypt(password, algorithm="RC4-128")
    written = BytesIO()
    writer.write(written)
    return written.getvalue()


def docx() -> bytes:
    """A Word document of two pages with headings, a table with a merged cell, and an insertion that is tracked."""
    from docx import Document
    from docx.oxml import OxmlElement

    document = Document()
    document.core_properties.title = "The lease"
    document.add_heading("Lease", 0)
    document.add_paragraph("The rent is due in May.")
    chapter = document.styles.add_style("Chapter", 1)
    chapter.base_style = document.styles["Heading 1"]
    document.add_paragraph("Roof 😀", style="Chapter")
    paragraph = document.add_paragraph("The roof ")
    paragraph.add_run()._r.append(OxmlElement("w:lastRenderedPageBreak"))
    inserted = OxmlElement("w:ins")
    inserted.append(paragraph.add_run("is new.\tYes")._r)
    paragraph._p.append(inserted)
    table = document.add_table(2, 2)
    for number, cell in enumerate(table._cells):
        cell.text = f"cell {number}"
    table.cell(1, 0).merge(table.cell(1, 1)).text = "merged\nlines"
    document.add_paragraph("The end.")
    written = BytesIO()
    document.save(written)
    return written.getvalue()
