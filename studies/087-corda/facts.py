# SPDX-License-Identifier: Apache-2.0
"""Short factual questions with their answers."""

from __future__ import annotations

EXAMPLES = """Question: What is the largest ocean?
Answer: Pacific
Question: How many legs does a spider have?
Answer: eight
"""

CAPITALS = """Afghanistan Kabul;Albania Tirana;Algeria Algiers;Angola Luanda;Argentina Buenos Aires;Armenia Yerevan;
Australia Canberra;Austria Vienna;Azerbaijan Baku;Bahrain Manama;Bangladesh Dhaka;Belarus Minsk;Belgium Brussels;
Bolivia La Paz;Botswana Gaborone;Brazil Brasilia;Bulgaria Sofia;Cambodia Phnom Penh;Cameroon Yaounde;Canada Ottawa;
Chad N'Djamena;Chile Santiago;China Beijing;Colombia Bogota;Croatia Zagreb;Cuba Havana;Cyprus Nicosia;Denmark Copenhagen;
Ecuador Quito;Egypt Cairo;Estonia Tallinn;Ethiopia Addis Ababa;Finland Helsinki;France Paris;Georgia Tbilisi;
Germany Berlin;Ghana Accra;Greece Athens;Guatemala Guatemala City;Haiti Port-au-Prince;Honduras Tegucigalpa;
Hungary Budapest;Iceland Reykjavik;India New Delhi;Indonesia Jakarta;Iran Tehran;Iraq Baghdad;Ireland Dublin;Italy Rome;
Jamaica Kingston;Japan Tokyo;Jordan Amman;Kenya Nairobi;Kuwait Kuwait City;Laos Vientiane;Latvia Riga;Lebanon Beirut;
Libya Tripoli;Lithuania Vilnius;Madagascar Antananarivo;Malaysia Kuala Lumpur;Mali Bamako;Malta Valletta;
Mexico Mexico City;Moldova Chisinau;Mongolia Ulaanbaatar;Morocco Rabat;Mozambique Maputo;Myanmar Naypyidaw;
Namibia Windhoek;Nepal Kathmandu;New Zealand Wellington;Nicaragua Managua;Niger Niamey;Nigeria Abuja;North Korea Pyongyang;
Norway Oslo;Oman Muscat;Pakistan Islamabad;Panama Panama City;Paraguay Asuncion;Peru Lima;Poland Warsaw;Portugal Lisbon;
Qatar Doha;Romania Bucharest;Russia Moscow;Rwanda Kigali;Saudi Arabia Riyadh;Senegal Dakar;Serbia Belgrade;
Slovakia Bratislava;Slovenia Ljubljana;Somalia Mogadishu;South Korea Seoul;Spain Madrid;Sudan Khartoum;Sweden Stockholm;
Switzerland Bern;Syria Damascus;Taiwan Taipei;Tanzania Dodoma;Thailand Bangkok;Tunisia Tunis;Turkey Ankara;Uganda Kampala;
Ukraine Kyiv;Uruguay Montevideo;Uzbekistan Tashkent;Venezuela Caracas;Vietnam Hanoi;Yemen Sana'a;Zambia Lusaka;
Zimbabwe Harare"""
TWO_WORDS = ("New Zealand", "North Korea", "South Korea", "Saudi Arabia")

STATES = """Alabama Montgomery;Alaska Juneau;Arizona Phoenix;Arkansas Little Rock;California Sacramento;Colorado Denver;
Connecticut Hartford;Delaware Dover;Florida Tallahassee;Hawaii Honolulu;Idaho Boise;Illinois Springfield;
Indiana Indianapolis;Iowa Des Moines;Kansas Topeka;Kentucky Frankfort;Louisiana Baton Rouge;Maine Augusta;
Maryland Annapolis;Massachusetts Boston;Michigan Lansing;Minnesota St. Paul;Mississippi Jackson;Montana Helena;
Nebraska Lincoln;Nevada Carson City;Ohio Columbus;Oklahoma Oklahoma City;Oregon Salem;Pennsylvania Harrisburg;
Tennessee Nashville;Texas Austin;Utah Salt Lake City;Vermont Montpelier;Virginia Richmond;Washington Olympia;
Wisconsin Madison;Wyoming Cheyenne"""

SYMBOLS = """hydrogen H;helium He;lithium Li;beryllium Be;boron B;carbon C;nitrogen N;oxygen O;fluorine F;neon Ne;sodium Na;
magnesium Mg;aluminum Al;silicon Si;phosphorus P;sulfur S;chlorine Cl;argon Ar;potassium K;calcium Ca;titanium Ti;
chromium Cr;manganese Mn;iron Fe;cobalt Co;nickel Ni;copper Cu;zinc Zn;gallium Ga;germanium Ge;arsenic As;bromine Br;
krypton Kr;strontium Sr;silver Ag;cadmium Cd;tin Sn;antimony Sb;iodine I;xenon Xe;cesium Cs;barium Ba;tungsten W;
platinum Pt;gold Au;mercury Hg;lead Pb;bismuth Bi;radium Ra;uranium U;plutonium Pu"""

AUTHORS = """Hamlet=William Shakespeare;Romeo and Juliet=William Shakespeare;Macbeth=William Shakespeare;
Pride and Prejudice=Jane Austen;Emma=Jane Austen;Great Expectations=Charles Dickens;Oliver Twist=Charles Dickens;
A Tale of Two Cities=Charles Dickens;War and Peace=Leo Tolstoy;Anna Karenina=Leo Tolstoy;
Crime and Punishment=Fyodor Dostoevsky;Moby Dick=Herman Melville;The Great Gatsby=F. Scott Fitzgerald;
To Kill a Mockingbird=Harper Lee;1984=George Orwell;Animal Farm=George Orwell;Brave New World=Aldous Huxley;
Jane Eyre=Charlotte Bronte;Frankenstein=Mary Shelley;Dracula=Bram Stoker;Don Quixote=Miguel de Cervantes;
The Odyssey=Homer;The Divine Comedy=Dante Alighieri;Les Miserables=Victor Hugo;The Hobbit=J.R.R. Tolkien;
The Lord of the Rings=J.R.R. Tolkien;The Catcher in the Rye=J.D. Salinger;Ulysses=James Joyce;
The Metamorphosis=Franz Kafka;The Trial=Franz Kafka;The Picture of Dorian Gray=Oscar Wilde;
The Grapes of Wrath=John Steinbeck;Of Mice and Men=John Steinbeck;The Old Man and the Sea=Ernest Hemingway;
The Jungle Book=Rudyard Kipling;Alice in Wonderland=Lewis Carroll;Treasure Island=Robert Louis Stevenson;
The Adventures of Tom Sawyer=Mark Twain;Adventures of Huckleberry Finn=Mark Twain;The Time Machine=H.G. Wells;
Fahrenheit 451=Ray Bradbury;The Stranger=Albert Camus;The Republic=Plato;On the Origin of Species=Charles Darwin;
The Wealth of Nations=Adam Smith;The Prince=Niccolo Machiavelli;The Canterbury Tales=Geoffrey Chaucer;
Paradise Lost=John Milton;Wuthering Heights=Emily Bronte;Harry Potter=J.K. Rowling"""

CONTINENTS = """Kenya Africa;Nigeria Africa;Egypt Africa;Morocco Africa;Ghana Africa;Ethiopia Africa;Japan Asia;China Asia;
India Asia;Thailand Asia;Vietnam Asia;Nepal Asia;Pakistan Asia;France Europe;Germany Europe;Italy Europe;Spain Europe;
Poland Europe;Norway Europe;Greece Europe;Brazil South America;Peru South America;Chile South America;
Argentina South America;Colombia South America;Canada North America;Mexico North America"""

LANGUAGES = """France French;Germany German;Italy Italian;Spain Spanish;Portugal Portuguese;Brazil Portuguese;Japan Japanese;
China Mandarin;Russia Russian;Greece Greek;Turkey Turkish;Poland Polish;Sweden Swedish;Norway Norwegian;Denmark Danish;
Finland Finnish;Hungary Hungarian;Mexico Spanish;Argentina Spanish;Egypt Arabic;Iran Persian;Israel Hebrew;Thailand Thai;
Vietnam Vietnamese;Austria German;Ukraine Ukrainian;Romania Romanian;Bulgaria Bulgarian;Croatia Croatian;Iceland Icelandic;
Chile Spanish;Peru Spanish;Cuba Spanish;Iraq Arabic;Morocco Arabic;Jordan Arabic"""

FORMULAS = """water=H2O;table salt=NaCl;carbon dioxide=CO2;methane=CH4;ammonia=NH3;glucose=C6H12O6;carbon monoxide=CO;
hydrogen peroxide=H2O2;sulfuric acid=H2SO4;hydrochloric acid=HCl;ozone=O3;ethanol=C2H5OH"""


def _pairs(text: str, between: str = " ") -> list[tuple[str, str]]:
    """(name, answer) of each entry: split at the first `between`, or after a name of two words."""
    found = []
    for entry in text.replace("\n", "").split(";"):
        name = next((n for n in TWO_WORDS if entry.startswith(n)), entry.split(between, 1)[0])
        found.append((name, entry[len(name) + len(between) :]))
    return found


def facts() -> list[tuple[str, str]]:
    """(question, answer) of every fact."""
    made = [(f"What is the capital of {n}?", a) for n, a in _pairs(CAPITALS)]
    made += [(f"What is the capital city of the U.S. state of {n}?", a) for n, a in _pairs(STATES)]
    made += [(f"What is the chemical symbol for {n}?", a) for n, a in _pairs(SYMBOLS)]
    made += [(f'Who wrote "{n}"?', a) for n, a in _pairs(AUTHORS, "=")]
    made += [(f"On which continent is {n}?", a) for n, a in _pairs(CONTINENTS)]
    made += [(f"What is the official language of {n}?", a) for n, a in _pairs(LANGUAGES)]
    made += [(f"What is the chemical formula of {n}?", a) for n, a in _pairs(FORMULAS, "=")]
    return made
